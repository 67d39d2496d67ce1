"""KV that goes to a decode node in 8 bits: a quarter of float32's bytes, and the tokens that one engine has behind KV so rounded."""

import re
from pathlib import Path

import pytest
import torch

from disaggd.engine.engine import generate
from disaggd.kernels import fp8
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import in_fp8
from tests.support.clusters import Cluster, running
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process


def behind_rounded(oracle: Oracle, prompt: list[int], num_tokens: int) -> list[int]:
    """What follows the prompt when its KV has gone through the wire format, once its first token was there."""
    tokens = []
    for output in generate(oracle.engine, prompt, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)):
        if not tokens:
            (sequence,) = oracle.engine.sequences.values()
            table = torch.tensor(sequence.block_table[: oracle.kv_spec.blocks_for(len(prompt))])
            blocks = oracle.kv[:, table]
            oracle.kv[:, table] = fp8.dequantize(fp8.quantize(blocks), *blocks.shape[-2:], blocks.dtype)
        tokens += output.tokens
    return tokens


PAIRS = [pytest.param(1, 1, marks=pytest.mark.nightly), pytest.param(2, 1, marks=pytest.mark.nightly), (1, 2)]


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), PAIRS)
def test_a_prompt_comes_in_a_quarter_of_its_bytes_and_its_tokens_are_those_of_rounded_kv(
    directory: Path, oracle: Oracle, prefill_ranks: int, decode_ranks: int
) -> None:
    cluster = Cluster(directory, transfer={"wire_dtype": "fp8", "verify": decode_ranks == 2})
    cluster.nodes["p0"].options["tp"], cluster.nodes["d0"].options["tp"] = prefill_ranks, decode_ranks
    prompt = prompt_of(300, oracle, salt=3)
    with running(cluster):
        assert re.search("p0 → d0: KV path is ready: checked .*, repacked,", cluster.log("router").read_text()), "a pattern comes as it was"
        reply = cluster.complete(prompt, max_tokens=24, ignore_eos=True, logprobs=0)
        receipt = cluster.receipt(reply["id"])
        assert receipt["decision"] == "remote"
        num_blocks = oracle.kv_spec.blocks_for(300)
        assert receipt["kv_bytes"] == num_blocks * in_fp8(oracle.kv_spec).bytes_per_block < oracle.kv_bytes(300) * 0.252
        assert reply["choices"][0]["logprobs"]["tokens"] == oracle.labels(behind_rounded(oracle, prompt, 24))
        cluster.wait_idle()
