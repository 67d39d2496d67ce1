"""A short run of the chaos driver, the same one each time: each kind of fault once but the long hangs, and nothing is lost."""

from pathlib import Path

import pytest
import torch

from tests.chaos.campaign import Plan, carry_out
from tests.support.oracle import Oracle

pytestmark = pytest.mark.process

PLAN = Plan(seed=51467, faults=10, requests=30, tempo="quick", rate=2.0, cases=22, rest_every=5)
"""Of this seed's ten faults each is of another kind, as long as there is a wire to harm; three have a process started anew."""


def test_nothing_is_lost(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    report = carry_out(PLAN, tmp_path, Oracle(), print)
    assert report.findings == []
    assert len(report.faults) == PLAN.faults
    assert not report.has_wire or len({record.spell.fault.kind for record in report.faults}) == PLAN.faults
    assert report.requests >= PLAN.requests and report.ends["complete"] > PLAN.requests // 2
