"""What can be known of the Triton kernels without a GPU: that they are right, interpreted, and that they compile for sm_90.

Each in a process of its own: a process either interprets Triton's functions or compiles them, from its first import of triton on.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.run(command, env=inherited | environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def test_the_kernels_pass_in_the_interpreter():
    """Takes 25 s: tests/kernels/gpu has some 150 tests, of programs interpreted at 5–9 ms each."""
    numpy_by_triton_3_6 = "ignore:Conversion of an array with ndim:DeprecationWarning"  # an error from numpy 2.4 on: that needs triton 3.7
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", numpy_by_triton_3_6, HERE / "gpu", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_sm_90():
    """Takes 30 s: 60 kernels at half a second. Its output is the table of what each takes."""
    run("-m", "tests.kernels.compile_sm90")
