"""A client that goes: what was computed for it ends, and every block comes back."""

import json

import httpx
import pytest

from tests.support.clusters import Cluster, wait_until
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

FREED_S = 3.0
"""One second and the step under way, on a host that runs other tests too."""


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


@pytest.mark.parametrize("policy", ["local", "remote"])
def test_a_client_that_goes_during_prefill_frees_everything(cluster: Cluster, oracle: Oracle, policy: str) -> None:
    """Remote: blocks are granted and pushes are in flight, so this takes Cancel and Quiesced."""
    state = {"local": "used", "remote": "granted"}[policy]
    client = httpx.Client(timeout=60)
    request = client.build_request(
        "POST", cluster.url + "/v1/completions", json=body(prompt_of(3000, oracle)), headers={"x-disaggd-policy": policy}
    )
    with client, pytest.raises(httpx.ReadTimeout):
        request.extensions["timeout"] = {"connect": 5, "write": 5, "pool": 5, "read": 0.4}
        client.send(request)
    wait_until(f"blocks were {state}, and are no more", lambda: cluster.blocks(state) == 0, FREED_S)
    cluster.wait_idle(FREED_S)


def test_whole_replies_are_aborted_as_well(cluster: Cluster, oracle: Oracle) -> None:
    before = sum(cluster.metric("disaggd_request_finished_total").values())
    with pytest.raises(httpx.ReadTimeout):
        whole = {**body(prompt_of(40, oracle)), "stream": False}
        httpx.post(cluster.url + "/v1/completions", json=whole, timeout=httpx.Timeout(10, read=0.3))
    wait_until("the sequence ended", lambda: sum(cluster.metric("disaggd_request_finished_total").values()) == before + 1, FREED_S)
    cluster.wait_idle(FREED_S)
