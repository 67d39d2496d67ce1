"""Every bench runs with `--quick`: they use insides that no other test looks at, so that a change elsewhere breaks them unseen."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICK = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if '"--quick"' in path.read_text(encoding="utf-8"))
DEADLINE_S = 300.0

pytestmark = [pytest.mark.process, pytest.mark.nightly]


@pytest.mark.parametrize("bench", QUICK)
def test_a_bench_runs(bench: str, tmp_path: Path) -> None:
    if bench == "kernels" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        command = [sys.executable, str(ROOT / "bench" / f"{bench}.py"), "--quick"]
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        code = process.wait(DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
    assert code == 0, log.read_text(errors="replace")[-4000:]


def test_benches_are_found() -> None:
    assert "served" in QUICK and len(QUICK) >= 15
