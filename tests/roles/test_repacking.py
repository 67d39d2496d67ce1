"""Which nodes have memory to make blocks in that others are to have."""

import pytest

from disaggd.config import parse_config
from disaggd.roles.repacking import repack_settings

CLUSTER = """
[disaggregation]
prefix_push = "{prefix_push}"

[[node]]
name = "router"
role = "router"
listen = "127.0.0.1:8000"

[[node]]
name = "p0"
role = "prefill"
listen = "127.0.0.1:8101"
device = "{device}"

[[node]]
name = "d0"
role = "decode"
listen = "127.0.0.1:8102"
device = "{device}"
"""


@pytest.mark.parametrize(
    ("name", "device", "prefix_push", "writes"),
    [("p0", "cuda:0", "never", True), ("d0", "cpu", "auto", True), ("d0", "cpu", "never", False), ("d0", "cuda:0", "auto", False)],
)
def test_only_a_node_that_writes_to_others_wants_memory_for_it(name: str, device: str, prefix_push: str, writes: bool) -> None:
    config = parse_config(CLUSTER.format(device=device, prefix_push=prefix_push))
    assert (repack_settings(config, config.node(name)) is not None) == writes
