"""The Triton kernels where there is no GPU: in Triton's interpreter, in a process of its own (see tests/kernels/triton/conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "triton"


def test_the_kernels_pass_in_the_interpreter():
    """Takes 30 s: some 150 tests, of programs interpreted at 5–9 ms each."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
