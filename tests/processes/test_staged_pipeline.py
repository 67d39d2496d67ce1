"""A cluster on the CPU that handles its KV as one on GPUs does: through staging memory, with late copies of what is computed late.
It equals the oracle."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.test_exactness import run
from tests.processes.test_failures import PATIENT, kill_amid_writes
from tests.support.clusters import Block, Cluster, running
from tests.support.completions import check, complete_all
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def staged(
    directory: Path, oracle: Oracle, num_blocks: int, *, prefill: int = 1, cluster: Block | None = None, **transfer: object
) -> Cluster:
    """Each engine node has staging memory of so many blocks, which takes KV in one direction: as on a GPU nobody pushes prefixes back."""
    sections: dict[str, Block] = {
        "transfer": {**transfer, "staging": num_blocks * oracle.kv_spec.bytes_per_block},
        "disaggregation": {"prefix_push": "never"},
        "cluster": cluster or {},
    }
    return Cluster(directory, prefill=prefill, module="tests.support.staged_node", **sections)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Cluster]:
    """Thirteen blocks hold the longest prompt of `test_exactness`, of eleven; or several short ones, whose pushes then mix."""
    with running(staged(tmp_path_factory.mktemp("staged"), oracle, 13, prefill=2)) as cluster:
        yield cluster


def test_concurrent_requests_equal_the_oracle_though_few_of_them_can_land_at_once(cluster: Cluster, oracle: Oracle) -> None:
    receipts = run(cluster, oracle, 32, 8)
    assert {receipt["decision"] for receipt in receipts} == {"local", "remote"}
    assert all(receipt["retries"] == 0 for receipt in receipts)


def test_a_prompt_longer_than_the_staging_memory_is_prefilled_by_its_decode_node(cluster: Cluster, oracle: Oracle) -> None:
    options = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    work = [(prompt_of(num_tokens, oracle), options) for num_tokens in (832, 833)]
    replies = asyncio.run(complete_all(cluster, work))
    for reply, (prompt, sampling) in zip(replies, work, strict=True):
        check(reply, prompt, sampling, oracle)
    fits, longer = (cluster.receipt(reply["id"]) for reply in replies)
    assert (fits["decision"], fits["kv_bytes"]) == ("remote", oracle.kv_bytes(832))
    assert (longer["decision"], longer["reason"]) == ("local", "staging: 833 uncached tokens > 832 that can be received")
    cluster.wait_idle()


@pytest.mark.nightly
@pytest.mark.parametrize(("num_prefill", "num_decode"), [(2, 1), (2, 2), (1, 4)])
def test_each_rank_has_staging_memory_of_its_own(directory: Path, oracle: Oracle, num_prefill: int, num_decode: int) -> None:
    """Few prompts can land at once; a sequence begins when what it needs is in the pool of every rank."""
    num_copies = max(1, num_decode // oracle.kv_spec.groups[0].kv_heads)
    made = staged(directory, oracle, 13 * num_copies, verify=True)
    made.nodes["p0"].options["tp"], made.nodes["d0"].options["tp"] = num_prefill, num_decode
    with running(made) as cluster:
        run(cluster, oracle, 16, 8)


@pytest.mark.parametrize(
    ("wire_dtype", "prefill_size", "decode_ranks"),
    [("auto", 16, 1), *(pytest.param(*each, 2, marks=pytest.mark.nightly) for each in (("auto", 16), ("auto", 48), ("fp8", 16)))],
)
def test_other_blocks_go_out_of_a_pool_that_is_staged(
    directory: Path, oracle: Oracle, wire_dtype: str, prefill_size: int, decode_ranks: int
) -> None:
    """Of every rank, made into the target's first; in fp8 they land beside its pool, and are unpacked on all ranks."""
    made = staged(directory, oracle, 13, wire_dtype=wire_dtype)
    made.nodes["p0"].options |= {"block_size": prefill_size, "tp": 2}
    made.nodes["d0"].options["tp"] = decode_ranks
    prompt, options = prompt_of(400, oracle, salt=3), {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    with running(made) as cluster:
        [reply] = asyncio.run(complete_all(cluster, [(prompt, options)], "remote"))
        receipt = cluster.receipt(reply["id"])
        assert receipt["decision"] == "remote"
        if wire_dtype == "auto":
            check(reply, prompt, options, oracle)
        else:
            assert receipt["kv_bytes"] < oracle.kv_bytes(400) * 0.3
        cluster.wait_idle()


@pytest.mark.nightly
def test_requests_survive_their_prefill_node_killed_with_writes_in_flight(directory: Path, oracle: Oracle) -> None:
    with running(staged(directory, oracle, 200, cluster=PATIENT["cluster"], **PATIENT["transfer"])) as cluster:
        kill_amid_writes(cluster, oracle)
