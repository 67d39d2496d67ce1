"""`disaggd` on hosts that garble what they send: one block of the first write of a process arrives otherwise than it was.

`python -m tests.support.corrupting_node --name NODE --config FILE`

Where pairs are checked, that is the first pattern.

The pool of the writer is as before once the write has ended: it is the wire that is at fault. Prompts must be computed in one step, or
the writer itself would read what is wrong for a moment.
"""

import ctypes
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

from disaggd import cli


def import_role(name: str) -> ModuleType:
    """What `cli` asks for once the process has its environment: nothing of NIXL may be imported before."""
    role = importlib.import_module(name)
    if not name.endswith("router"):
        corrupt(importlib.import_module("disaggd.transfer.agent").Agent)
    return role


def corrupt(agent_class: Any) -> None:
    """Patch `Agent`: the first block of a write is inverted when it is posted, checksums being taken, and put right when it has ended."""
    connect, prepare, post, poll = agent_class.connect, agent_class.prepare, agent_class.post, agent_class.poll
    read: dict[str, Any] = {}
    prepared: dict[tuple[str, int], Any] = {}
    inverted: dict[tuple[str, int], Any] = {}

    def connect_and_note(self: Any, agent_id: Any, metadata: bytes, sources: Any, targets: Any) -> None:
        read[self.agent_id] = sources
        connect(self, agent_id, metadata, sources, targets)

    def prepare_and_note(self: Any, agent_id: Any, sources: Any, targets: Any, message: bytes) -> int:
        handle: int = prepare(self, agent_id, sources, targets, message)
        if not prepared:
            prepared[self.agent_id, handle] = _block(read[self.agent_id], int(sources[0]))
        return handle

    def invert_and_post(self: Any, handle: int) -> None:
        if (block := prepared.get((self.agent_id, handle))) is not None:
            _invert(block)
            inverted[self.agent_id, handle] = block
        post(self, handle)

    def poll_and_restore(self: Any, handle: int) -> bool:
        is_done: bool = poll(self, handle)
        if is_done and (block := inverted.pop((self.agent_id, handle), None)) is not None:
            _invert(block)
        return is_done

    agent_class.connect = connect_and_note
    agent_class.prepare, agent_class.post, agent_class.poll = prepare_and_note, invert_and_post, poll_and_restore


def _block(descriptors: Any, number: int) -> Any:
    address = descriptors.region.address + descriptors.offset + number * descriptors.stride
    return (ctypes.c_uint8 * descriptors.length).from_address(address)


def _invert(block: Any) -> None:
    block[:] = bytes(~byte & 0xFF for byte in block)


if __name__ == "__main__":
    cli.importlib = SimpleNamespace(import_module=import_role)  # type: ignore[assignment]
    cli.main()
