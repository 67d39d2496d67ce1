from pathlib import Path

import pytest

from disaggd.config import NodeConfig
from disaggd.engine.step_cost import StepLoad
from disaggd.errors import ConfigError
from disaggd.ids import NodeName
from disaggd.simulator.costs import Costs, StepCosts, load_costs
from disaggd.units import Address

P0 = NodeConfig(name=NodeName("p0"), role="prefill", listen=Address("127.0.0.1:1"))
D0 = NodeConfig(name=NodeName("d0"), role="decode", listen=Address("127.0.0.1:2"))


def test_a_step_takes_the_sum_of_what_is_in_it() -> None:
    costs = StepCosts(
        base_ms=1,
        per_sequence_ms=0.5,
        per_context_token_us=10,
        per_prefill_token_us=100,
        per_prefill_token_context_ns=1000,
    )
    assert costs.step_s(StepLoad(2, 60, 20, 2200.0)) == pytest.approx((1 + 1 + 0.6 + 2 + 2.2) / 1e3)


def test_a_nodes_own_table_comes_before_its_roles_and_that_before_everybodys(tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text("""
[link]
kv_mbit_per_s = 1000
[step]
base_ms = 1
per_sequence_ms = 1
per_prefill_token_us = 1
[decode]
per_sequence_ms = 2
per_prefill_token_us = 2
[node.d0]
per_prefill_token_us = 3
""")
    costs = load_costs(path)
    assert costs.link.kv_mbit_per_s == 1000
    assert costs.of(P0) == StepCosts(base_ms=1, per_sequence_ms=1, per_prefill_token_us=1)
    assert costs.of(D0) == StepCosts(base_ms=1, per_sequence_ms=2, per_prefill_token_us=3)


def test_without_a_file_every_node_is_the_machine_that_was_measured() -> None:
    """Within a tenth of bench/results/2026-11-26-cpu.md: 2,048 tokens in four chunks, and a decode step of eight."""
    costs = Costs().of(P0)
    prefill_s = sum(costs.step_s(StepLoad(0, 0, 512, 512 * (start + 256))) for start in range(0, 2048, 512))
    assert prefill_s == pytest.approx(0.874, rel=0.1)
    assert costs.step_s(StepLoad(8, 8 * 1035, 0, 0)) == pytest.approx(11.52e-3, rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[step", "not valid TOML"),
        ("[step]\nbase_ms = 0", "expected float > 0"),
        ("[step]\nbase_mss = 1", "step: base_mss: unknown key (base_ms?)"),
        ("[stop]\nbase_ms = 1", "stop: unknown key (step?)"),
        ("[node.d0]\nper_sequence_ms = -1", "node.d0: per_sequence_ms: expected float >= 0"),
        ("[decode]\nbase_ms = 'fast'", "expected float, got str"),
        ("[link]\nkv_mbit_per_s = 0", "link.kv_mbit_per_s: expected float > 0"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_costs(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"costs\.toml: no such file"):
        load_costs(tmp_path / "costs.toml")
