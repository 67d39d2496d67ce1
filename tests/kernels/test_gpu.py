"""What can be known of the Triton kernels without a GPU: that they are right, interpreted, and that they compile for sm_90.

With the installed triton, and with the oldest that pyproject.toml allows, which `make test` puts beside it. Each in a process of its own: a
process either interprets Triton's functions or compiles them, from its first import of triton on, and has one triton.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDEST = "3.6"
FOLDER = Path(sys.prefix) / f"triton-{OLDEST}"
INHERITED = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}

CHECKED = """
import runpy, sys, triton
expected, module, *arguments = sys.argv[1:]
assert f"{triton.__version__}.".startswith(f"{expected}."), f"this is triton {triton.__version__} of {triton.__file__}, not {expected}"
sys.argv[1:] = arguments
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class Triton:
    """A version, and where it lies; None: among the installed packages."""

    version: str
    folder: Path | None

    def run(self, module: str, *arguments: object, **environment: str) -> None:
        """`python -m module …` with this triton and no other."""
        if self.folder is not None:
            environment |= {"PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-c", CHECKED, self.version, module, *map(str, arguments)]
        process = subprocess.run(command, env=INHERITED | environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture
def installed() -> Triton:
    return Triton(metadata.version("triton"), None)


@pytest.fixture
def oldest() -> Triton:
    if not FOLDER.is_dir():
        unmet = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        unmet(f"{FOLDER} is not there: `make test` installs it")
    return Triton(OLDEST, FOLDER)


def interpret(triton: Triton, *options: str) -> None:
    numpy_by_triton_3_6 = "ignore:Conversion of an array with ndim:DeprecationWarning"  # an error from numpy 2.4 on
    arguments = ("-q", "-p", "no:cacheprovider", "-W", numpy_by_triton_3_6, *options, HERE / "gpu")
    triton.run("pytest", *arguments, TRITON_INTERPRET="1")


def test_the_kernels_pass_in_the_interpreter(installed: Triton) -> None:
    """Takes 40 s, or more beside others: tests/kernels/gpu has 280 tests, of programs interpreted at 5–9 ms each."""
    interpret(installed)


def test_the_kernels_pass_in_the_oldest_interpreter(oldest: Triton) -> None:
    """Of each test one case: what a version of Triton lacks, it hardly has for other shapes. All of them: every night."""
    interpret(oldest, "--last-cases")


@pytest.mark.nightly
def test_every_case_of_the_kernels_passes_in_the_oldest_interpreter(oldest: Triton) -> None:
    interpret(oldest)


def test_the_kernels_compile_for_sm_90(installed: Triton) -> None:
    """In every configuration: a hundred kernels at half a second each. Its output is the table of what each takes."""
    installed.run("tests.kernels.compile_sm90")


def test_the_oldest_triton_compiles_each_kernel(oldest: Triton) -> None:
    """With each of its switches; for the reason above not in every configuration, which is for the night."""
    oldest.run("tests.kernels.compile_sm90", "--first")


@pytest.mark.nightly
def test_every_configuration_compiles_with_the_oldest_triton(oldest: Triton) -> None:
    oldest.run("tests.kernels.compile_sm90")
