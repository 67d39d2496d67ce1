"""Nodes whose blocks differ in size hand over to each other, both ways: what comes out is the oracle's."""

import asyncio
from pathlib import Path

import pytest

from tests.support.clusters import Cluster, running
from tests.support.completions import Work, check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ALWAYS = {"disaggregation": {"prefix_push": "always"}, "transfer": {"verify": True}}
SIZES = [
    pytest.param(16, 64, 2, id="16-64 and two ranks"),
    pytest.param(16, 64, 1, id="16-64", marks=pytest.mark.nightly),
    pytest.param(64, 16, 1, id="64-16", marks=pytest.mark.nightly),
    pytest.param(48, 64, 1, id="48-64", marks=pytest.mark.nightly),
    pytest.param(128, 48, 2, id="128-48 and two ranks", marks=pytest.mark.nightly),
]
"""Of the prefill node, and of the decode node; and the prefill node's ranks."""


def cluster_of(directory: Path, prefill_size: int, decode_size: int, num_ranks: int = 1) -> Cluster:
    cluster = Cluster(directory, nodes={"max_step_tokens": 256}, **ALWAYS)
    cluster.nodes["p0"].options |= {"block_size": prefill_size, "tp": num_ranks}
    cluster.nodes["d0"].options |= {"block_size": decode_size}
    return cluster


def whole(num_tokens: int, block_size: int) -> int:
    """Those of the tokens that fill blocks."""
    return num_tokens - num_tokens % block_size


@pytest.mark.parametrize(("prefill_size", "decode_size", "num_ranks"), SIZES)
def test_a_hand_off_between_sizes_says_what_one_engine_says(
    directory: Path, oracle: Oracle, prefill_size: int, decode_size: int, num_ranks: int
) -> None:
    """So does one that is computed in chunks, and one whose prefix was pushed the other way before."""
    token_bytes = oracle.kv_spec.bytes_per_block // oracle.kv_spec.block_size
    with running(cluster_of(directory, prefill_size, decode_size, num_ranks)) as cluster:
        work: Work = [(prompt_of(num_tokens, oracle, salt=i), GREEDY) for i, num_tokens in enumerate((1, 63, 400, 640, 901))]
        for reply, (prompt, sampling) in zip(asyncio.run(complete_all(cluster, work, "remote")), work, strict=True):
            check(reply, prompt, sampling, oracle)
        fresh = prompt_of(500, oracle, salt=77)
        asyncio.run(complete_all(cluster, [(fresh, GREEDY)], "local"))
        turn = fresh + prompt_of(300, oracle, salt=78)
        (reply,) = asyncio.run(complete_all(cluster, [(turn, GREEDY)], "remote"))
        check(reply, turn, GREEDY, oracle)
        receipt, left_out = cluster.receipt(reply["id"]), whole(len(fresh), decode_size)
        pushed = whole(left_out, prefill_size)
        assert receipt["cached_tokens"] == {"decode": left_out, "prefill": pushed}
        assert (receipt["prefix_push"]["outcome"], receipt["prefix_push"]["kv_bytes"]) == ("landed", pushed * token_bytes)
        assert receipt["kv_bytes"] == (whole(len(turn) + decode_size - 1, decode_size) - left_out) * token_bytes
        cluster.wait_idle()
        assert [node["block_size"] for node in cluster.get("/v1/cluster").json()["nodes"]] == [prefill_size, decode_size]
