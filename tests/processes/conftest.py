"""What process tests share: a quiet 1P1D cluster, and the oracle it must equal."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.clusters import Cluster, running
from tests.support.oracle import Oracle


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    torch.set_num_threads(1)
    return Oracle()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """1P1D that no test harms: prompts of up to 128 tokens stay local."""
    with running(Cluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path
