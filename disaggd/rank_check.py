"""`disaggd check --tp N`: whether N ranks say of this model what one says, and how far apart their logits are.

Runs on the main thread, on CPUs or on the node's GPUs. Knows no router, no link and no transfer.
"""

import sys

from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine, build_engine
from disaggd.engine.comparison import Comparison, compare_ranks
from disaggd.errors import ConfigError
from disaggd.gateway.tokenizer import read_tokenizer
from disaggd.log import start_progress
from disaggd.model.directory import open_directory
from disaggd.transfer.layout import kv_spec
from disaggd.transfer.share import block_bytes

NUM_TOKENS = 64
PROMPT = (
    "The lighthouse keeper wrote down what he saw every evening: the wind, the height of the waves, and the names of the ships that "
    "passed. In the winter of 1887 the entries grow shorter, and on the ninth of January there is only one line, in another hand: "
)


def run(config: Config, node: NodeConfig, tp: int) -> int:
    """Prints the comparison; the exit code, 1 if the ranks are further apart than rounding takes them. Raises DisaggdError.

    With the model of the file, and the threads and the block size of `node`, for each rank.
    """
    if node.is_gpu and node.tp != tp:
        raise ConfigError(f"node {node.name!r}: --tp {tp} takes as many GPUs, but its devices are {', '.join(node.rank_devices)}")
    directory = open_directory(config.model.path)
    spec = directory.spec(config.model.dtype)
    spec.check_ranks(tp)
    prompt = read_tokenizer(directory.root, spec.vocab_size).encode(PROMPT, add_special_tokens=True)
    kv = kv_spec(spec, node.block_size)

    def build(ranks: int) -> LoadedEngine:
        with start_progress(f"{config.model.served_name}, tp = {ranks}") as progress:
            return build_engine(
                config.model.path,
                dtype=config.model.dtype,
                weights=config.model.weights,
                devices=node.rank_devices[:ranks] if node.is_gpu else ("cpu",) * ranks,
                kv_cache_bytes=kv.blocks_for(len(prompt) + NUM_TOKENS) * block_bytes(kv, ranks),
                block_size=node.block_size,
                max_step_tokens=node.max_step_tokens,
                max_sequences=node.max_sequences,
                max_model_len=config.model.max_model_len,
                progress=progress,
            )

    found = compare_ranks(build, prompt, NUM_TOKENS, tp)
    sys.stdout.write(f"\n{report(found)}\n")
    return 0 if found.is_close else 1


def report(found: Comparison) -> str:
    """What a reader sees of it."""
    verdict = "as far as rounding takes them" if found.is_close else f"MORE than the {found.tolerated_error:.2g} that rounding explains"
    by_rank = ", ".join(f"{num_bytes:,}" for num_bytes in found.rank_token_bytes)
    return "\n".join(
        (
            f"tp = {found.tp} beside tp = 1: {found.num_prompt_tokens} tokens of a prompt and {found.num_tokens} behind it, {found.dtype}",
            f"logits   at most {found.logit_error:.2g} apart, of {found.largest_logit:.3g} at most: {verdict}",
            f"tokens   {_tokens(found)}",
            f"KV       of a token {found.kv_token_bytes:,} bytes with one rank; by rank {by_rank}",
        )
    )


def _tokens(found: Comparison) -> str:
    if (first := found.first_difference) is None:
        return f"all {found.num_tokens} the same"
    what = f"number {first.index + 1} is {first.together} in place of {first.alone}, which led by {first.margin:.2g}"
    return f"{found.num_same} of {found.num_tokens} the same; {what}"
