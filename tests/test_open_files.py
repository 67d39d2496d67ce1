"""The limit of open files is raised as far as it goes, and never lowered."""

import asyncio
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from disaggd.open_files import allow_files
from disaggd.roles import node


@pytest.fixture
def hard() -> Iterator[int]:
    """With a soft limit of 512."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_the_limit_is_raised_to_what_is_wanted_and_not_lowered(hard: int) -> None:
    assert (allow_files(600), soft_limit()) == (600, 600)
    assert (allow_files(550), soft_limit()) == (550, 600)


def test_beyond_what_the_system_allows_it_is_raised_to_that(hard: int) -> None:
    if hard == resource.RLIM_INFINITY:
        pytest.skip("the system allows any number")
    assert (allow_files(hard + 1), soft_limit()) == (hard, hard)


def test_an_engine_node_raises_it_before_anything_else(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Node:
        def __init__(self, *_: Any) -> None:
            self.num_files = soft_limit()

        async def serve(self) -> None:
            assert self.num_files == (node.MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, node.MAX_FILES))

    monkeypatch.setattr(node, "EngineNode", Node)
    asyncio.run(node.run_engine_node(None, None, None))  # type: ignore[arg-type]
