"""Requests go to the decode node that has their prefix, and conversations stay where they were: two real decode nodes."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

BLOCK = 64


@pytest.fixture(scope="module")
def two_decodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(Cluster(tmp_path_factory.mktemp("two"), decode=2)) as cluster:
        yield cluster


@contextmanager
def d0_busy(cluster: Cluster, oracle: Oracle) -> Iterator[None]:
    """A stream runs on d0, which is the first by name."""
    body = {"model": "tiny", "prompt": prompt_of(100, oracle, salt=99), "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", cluster.url + "/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # kept: one that is collected closes the stream
        next(lines)
        assert cluster.receipt(stream.headers["x-request-id"])["decode_node"] == "d0"
        yield
    cluster.wait_idle()


def served_by(cluster: Cluster, prompt: list[int], **options: object) -> tuple[str, int]:
    """The decode node, and how much of the prompt it had."""
    receipt = cluster.receipt(cluster.complete(prompt, max_tokens=2, **options)["id"])
    return receipt["decode_node"], receipt["cached_tokens"]["decode"]


def indexed(cluster: Cluster, node: str) -> float:
    return cluster.metric("disaggd_cache_index_blocks").get((node,), 0.0)


def test_a_prompt_goes_where_it_was_before(two_decodes: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(600, oracle, salt=1)
    with d0_busy(two_decodes, oracle):
        assert served_by(two_decodes, prompt) == ("d1", 0)
    wait_until("the router knows of d1's blocks", lambda: indexed(two_decodes, "d1") >= 9, 5)
    assert served_by(two_decodes, prompt) == ("d1", 9 * BLOCK)
    assert served_by(two_decodes, prompt[:300] + prompt_of(300, oracle, salt=2)) == ("d1", 4 * BLOCK)
    assert served_by(two_decodes, prompt, cache_salt="another") == ("d0", 0)


def test_a_conversation_stays_on_its_node(two_decodes: Cluster, oracle: Oracle) -> None:
    """Its prompts are too short for a block to be cached."""
    prompt, session = prompt_of(20, oracle), {"x-session-id": "a conversation".replace(" ", "-")}
    with d0_busy(two_decodes, oracle):
        assert served_by(two_decodes, prompt, headers=session)[0] == "d1"
    assert served_by(two_decodes, prompt, headers=session)[0] == "d1"
    assert served_by(two_decodes, prompt)[0] == "d0"
