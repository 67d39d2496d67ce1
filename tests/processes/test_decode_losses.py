"""Streams that lose what they cannot do without: their last decode node, or the attention of their router."""

import signal
import time
from collections.abc import Iterator
from itertools import count

import httpx
import pytest

from disaggd.cluster.moves import DECODE_PATIENCE_S
from disaggd.sampling import SamplingParams
from tests.support.answers import Answers, Ask, Stream, contradiction
from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = [pytest.mark.process, pytest.mark.nightly]

LONG = SamplingParams(temperature=0.7, seed=3, max_tokens=1500, ignore_eos=True, frequency_penalty=0.1)

_numbers = count()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Whole before every test, and after it."""
    directory = tmp_path_factory.mktemp("cluster")
    with running(Cluster(directory, cluster={"heartbeat_s": 0.5}, transfer={"quiesce_s": 2.0})) as cluster:
        yield cluster


@pytest.fixture
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=60) as http:
        yield http


def decoding(http: httpx.Client, ask: Ask) -> Stream:
    stream = Stream(http, f"stream-{next(_numbers)}", ask, "", "local")
    wait_until("it decodes", lambda: stream.num_tokens >= 20 or stream.end is not None, 60)
    assert stream.end is None, stream.note
    return stream


def router_losses(cluster: Cluster) -> int:
    """How often d0 has lost its router."""
    return cluster.log("d0").read_text().count("link to router is down")


def heal(cluster: Cluster) -> None:
    wait_until("the cluster is whole", cluster.is_whole, 120, every_s=0.1)
    cluster.wait_idle(30)


def test_a_stream_that_no_decode_node_can_go_on_with_ends_with_an_error_event(cluster: Cluster, oracle: Oracle, http: httpx.Client) -> None:
    ask = Ask(prompt_of(50, oracle), LONG)
    stream = decoding(http, ask)
    lost_at = time.monotonic()
    cluster.kill("d0")
    stream.join(DECODE_PATIENCE_S + 30)
    waited_s = time.monotonic() - lost_at
    assert (stream.end, stream.note) == ("error", "no decode node is left to continue this request")
    assert waited_s > DECODE_PATIENCE_S, "it was given up too soon"
    assert contradiction(stream, Answers(oracle).to(ask)) is None
    assert cluster.receipt(stream.id)["finish_reason"] == "error"
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 503
    cluster.start_node("d0")
    heal(cluster)


def test_a_stream_waits_for_the_only_decode_node_to_come_back(cluster: Cluster, oracle: Oracle, http: httpx.Client) -> None:
    ask = Ask(prompt_of(50, oracle), LONG)
    stream = decoding(http, ask)
    cluster.kill("d0", signal.SIGSTOP)
    wait_until("its link is lost", lambda: cluster.metric("disaggd_node_up").get(("d0", "decode")) == 0.0, 30)
    cluster.kill("d0", signal.SIGCONT)
    stream.join(120)
    assert (stream.end, contradiction(stream, Answers(oracle).to(ask))) == ("complete", None)
    assert len(cluster.receipt(stream.id)["attempts"]) == 2
    heal(cluster)


def test_a_stream_goes_on_when_its_router_does(cluster: Cluster, oracle: Oracle, http: httpx.Client) -> None:
    """Its nodes have given the router up, and forgotten its sequences: they get them once more, with all that was sent."""
    ask = Ask(prompt_of(50, oracle), LONG)
    stream = decoding(http, ask)
    num_losses = router_losses(cluster)
    cluster.kill("router", signal.SIGSTOP)
    wait_until("d0 has given it up", lambda: router_losses(cluster) > num_losses, 30)
    cluster.kill("router", signal.SIGCONT)
    stream.join(120)
    assert (stream.end, contradiction(stream, Answers(oracle).to(ask))) == ("complete", None)
    assert len(cluster.receipt(stream.id)["attempts"]) == 2
    heal(cluster)
