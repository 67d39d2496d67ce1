"""The three-step pipeline over real processes and real NIXL: what a user sees of it."""

import re
from pathlib import Path

import httpx
import openai
import pytest

from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def test_a_short_prompt_is_prefilled_where_it_is_decoded(cluster: Cluster, oracle: Oracle) -> None:
    reply = cluster.complete(prompt_of(40, oracle), max_tokens=8)
    receipt = cluster.receipt(reply["id"])
    assert receipt["decision"] == "local"
    assert (receipt["prefill_node"], receipt["decode_node"]) == (None, "d0")
    assert (receipt["prompt_tokens"], receipt["output_tokens"], receipt["kv_bytes"]) == (40, 8, 0)


def test_a_long_prompt_is_prefilled_elsewhere_and_its_kv_pushed(cluster: Cluster, oracle: Oracle) -> None:
    reply = cluster.complete(prompt_of(1500, oracle), max_tokens=8)
    receipt = cluster.receipt(reply["id"])
    assert receipt["decision"] == "remote"
    assert (receipt["prefill_node"], receipt["decode_node"]) == ("p0", "d0")
    assert receipt["kv_bytes"] == oracle.kv_bytes(1500)
    assert all(receipt["spans_ms"][span] is not None for span in ("queue", "prefill", "transfer", "first_token", "decode", "total"))
    cluster.wait_idle()


def test_both_ways_give_the_same_tokens(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(300, oracle)
    local = cluster.complete(prompt, max_tokens=24, headers={"x-disaggd-policy": "local"})
    remote = cluster.complete(prompt, max_tokens=24, headers={"x-disaggd-policy": "remote"})
    assert [cluster.receipt(reply["id"])["decision"] for reply in (local, remote)] == ["local", "remote"]
    assert local["choices"][0]["text"] == remote["choices"][0]["text"]


def test_one_token_needs_no_transfer(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(700, oracle)
    reply = cluster.complete(prompt, max_tokens=1, logprobs=0)
    receipt = cluster.receipt(reply["id"])
    assert (receipt["decision"], receipt["kv_bytes"], receipt["output_tokens"]) == ("remote", 0, 1)
    expected = oracle.continue_(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    assert reply["choices"][0]["logprobs"]["tokens"] == oracle.labels(expected)
    cluster.wait_idle()


def test_a_first_token_that_stops_the_sequence_gives_its_grant_back(cluster: Cluster, oracle: Oracle) -> None:
    prompt = prompt_of(600, oracle)
    (first,) = oracle.continue_(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    reply = cluster.complete(prompt, max_tokens=50, stop_token_ids=[first])
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("stop", 1)
    cluster.wait_idle()


def test_the_whole_reply_names_the_way_it_took(cluster: Cluster, oracle: Oracle) -> None:
    body = {"model": "tiny", "prompt": prompt_of(500, oracle), "max_tokens": 64, "ignore_eos": True}  # the push is reported meanwhile
    reply = httpx.post(cluster.url + "/v1/completions", json=body, timeout=60)
    assert re.fullmatch(r"remote p0->d0 cached=0 kv=[0-9.]+MB", reply.headers["x-disaggd"])
    assert reply.headers["x-request-id"] == reply.json()["id"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(cluster: Cluster, oracle: Oracle) -> None:
    reply = httpx.post(cluster.url + "/v1/completions", json={"model": "tiny", "prompt": [5] * 5000}, timeout=60)
    assert reply.status_code == 400
    assert "5000" in reply.json()["error"]["message"] and "4096" in reply.json()["error"]["message"]


def test_the_stock_client_drives_chat_and_completions(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", timeout=60)
    with client:
        whole = client.completions.create(model="tiny", prompt="import os\n" * 60, max_tokens=12, temperature=0)
        streamed = client.completions.create(model="tiny", prompt="import os\n" * 60, max_tokens=12, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "def main():\n" * 60}]
        chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
        chunks = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        seen = list(chunks)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices) == chat.choices[0].message.content
        assert seen[-1].usage is not None and chat.usage is not None
        assert seen[-1].usage.total_tokens == chat.usage.total_tokens


def test_a_running_router_has_no_torch(cluster: Cluster) -> None:
    cluster.complete("import os\n", max_tokens=2)
    assert "libtorch" not in Path(f"/proc/{cluster.nodes['router'].pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{cluster.nodes['d0'].pid}/maps").read_text()  # the same look does find it


def test_metrics_and_cluster_tell_what_happened(cluster: Cluster) -> None:
    cluster.complete("import os\n" * 100, max_tokens=4)
    cluster.wait_idle()
    assert cluster.metric("disaggd_node_up") == {("d0", "decode"): 1, ("p0", "prefill"): 1}
    assert sum(cluster.metric("disaggd_decisions_total").values()) >= 1
    shown = cluster.get("/v1/cluster").json()
    assert [node["link"] for node in shown["nodes"]] == ["up", "up"]
    assert shown["pairs"] == [{"prefill": "p0", "decode": "d0", "state": "ready", "reason": ""}]
