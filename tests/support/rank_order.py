"""`ORDER`: what the second of two ranks on a CPU is to be."""

from disaggd.engine.rank_orders import HostMemory, RankOrder

ORDER = RankOrder(
    rank=1,
    num_ranks=2,
    port=1,
    path="builtin:tiny",
    dtype="float32",
    weights="auto",
    device="cpu",
    block_size=16,
    num_blocks=4,
    max_step_tokens=64,
    max_sequences=4,
    max_model_len=128,
    layer_group=4,
    memory=HostMemory(),
    step_timeout_s=30.0,
)
