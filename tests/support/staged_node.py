"""`disaggd` with every engine node handling its KV as a GPU's, wherever it computes: through staging memory, and late.

`python -m tests.support.staged_node --name NODE --config FILE`
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec

from disaggd import cli
from tests.support.copies import Late

PATIENCE = 3
"""So often a copy is asked about before it is made, and a device before it has come so far."""


def import_role(name: str) -> ModuleType:
    """What `cli` asks for once the process has its environment: nothing of torch may be imported before."""
    role = importlib.import_module(name)
    if not name.endswith("router"):
        stage(importlib.import_module("disaggd.roles.node"), importlib.import_module("disaggd.engine.rank"))
        importlib.import_module("disaggd.engine.stream").DeviceStream.mark = late_mark
    return role


def stage(node: Any, rank: Any) -> None:
    """Patch `disaggd.roles.node` and `disaggd.engine.rank`: its nodes have staging memory on every rank, the first one's late."""
    host_memory, make_staging = node.host_memory, rank.make_staging
    node.host_memory = lambda config, of: host_memory(config, msgspec.structs.replace(of, device="cuda"))
    rank.make_staging = lambda kv, spec, num_blocks: LateStaging(make_staging(kv, spec, num_blocks))


def late_mark(stream: object) -> Callable[[], bool]:
    """`DeviceStream.mark` of a device that is behind; like a GPU's event it goes through no pipe."""
    looks = count(1)
    return lambda: next(looks) >= PATIENCE


class LateStaging:
    """`KVStaging`, but no copy is made when it is asked for; what is read by then, or written, shows."""

    def __init__(self, staging: Any) -> None:
        self._staging = staging
        self.place = staging.place
        self._outward, self._inward = Late(PATIENCE), Late(PATIENCE)

    def copy_out(self, sources: Sequence[int], targets: Sequence[int]) -> Any:
        return self._outward.add(partial(self._staging.copy_out, sources, targets))

    def copy_in(self, landed: Sequence[int], blocks: Sequence[int]) -> Any:
        return self._inward.add(partial(self._staging.copy_in, landed, blocks))


if __name__ == "__main__":
    cli.importlib = SimpleNamespace(import_module=import_role)  # type: ignore[assignment]
    cli.main()
