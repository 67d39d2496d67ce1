"""A client that goes: what was computed for it ends, and every block comes back."""

import json
import socket

import httpx
import pytest

from tests.support.clusters import Cluster, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

FREED_S = 3.0
"""One second and the step under way, on a host that runs other tests too."""


NUM_PROMPTS = 12


def post(content: dict[str, object], headers: dict[str, str]) -> bytes:
    """A request as it lies on the wire."""
    raw = json.dumps(content).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: router", f"content-length: {len(raw)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + raw


def aborted(cluster: Cluster) -> float:
    return cluster.metric("disaggd_request_success_total").get(("abort",), 0.0)


def body(prompt: list[int]) -> dict[str, object]:
    return {"model": "tiny", "prompt": prompt, "max_tokens": 1000, "ignore_eos": True, "stream": True}


def test_a_client_that_goes_while_tokens_are_decoded_frees_everything(cluster: Cluster, oracle: Oracle) -> None:
    with httpx.stream("POST", cluster.url + "/v1/completions", json=body(prompt_of(300, oracle)), timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        for _ in range(4):
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
        wait_until("decode has the sequence", lambda: cluster.blocks("used") > 0, 5)
    cluster.wait_idle(FREED_S)
    receipt = cluster.receipt(stream.headers["x-request-id"])
    assert receipt["finish_reason"] == "abort"


@pytest.mark.parametrize(("policy", "state"), [("local", "used"), ("remote", "granted")])
def test_a_client_that_goes_during_prefill_frees_everything(cluster: Cluster, oracle: Oracle, policy: str, state: str) -> None:
    """Seconds of prefill, cut short. Remote: blocks are granted and pushes are in flight, so this takes Cancel and Quiesced."""
    prompts = [prompt_of(3000, oracle, salt=i) for i in range(NUM_PROMPTS)]
    before = aborted(cluster)
    with socket.create_connection(("127.0.0.1", cluster.nodes["router"].port)) as client:
        client.sendall(post({**body([]), "prompt": prompts}, {"x-disaggd-policy": policy}))
        wait_until(f"blocks are {state}", lambda: cluster.blocks(state) > 0, 10)
    cluster.wait_idle(FREED_S)
    assert aborted(cluster) == before + NUM_PROMPTS, "some had finished: the client left too late"


def test_whole_replies_are_aborted_as_well(cluster: Cluster, oracle: Oracle) -> None:
    before = sum(cluster.metric("disaggd_request_success_total").values())
    with pytest.raises(httpx.ReadTimeout):
        whole = {**body(prompt_of(40, oracle)), "stream": False}
        httpx.post(cluster.url + "/v1/completions", json=whole, timeout=httpx.Timeout(10, read=0.3))
    wait_until("the sequence ended", lambda: sum(cluster.metric("disaggd_request_success_total").values()) == before + 1, FREED_S)
    cluster.wait_idle(FREED_S)
