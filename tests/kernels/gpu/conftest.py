"""The Triton kernels against the reference, wherever Triton can run: on a GPU, or in its interpreter.

The interpreter must be chosen before triton is first imported, and transformers imports it: `tests/kernels/test_gpu.py` runs this folder in
a process of its own. By hand: `TRITON_INTERPRET=1 pytest tests/kernels/gpu`. Anywhere else nothing here is collected.

The interpreter takes 5–9 ms a program, so shapes are small; and it gets bfloat16 wrong, so that is for GPUs only.
"""

import pytest
import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"

if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--last-cases", action="store_true", help="of each test only the last case")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--last-cases", default=False):
        items[:] = {item.nodeid.partition("[")[0]: item for item in items}.values()


@pytest.fixture(scope="session")
def where() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def generator(where: torch.device) -> torch.Generator:
    return torch.Generator(where).manual_seed(7)


@pytest.fixture(params=[torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
