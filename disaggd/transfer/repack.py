"""`Repacked`: writes whose blocks are made for their target first, in a staging memory. Runs on the transfer thread.

Where block sizes or dtypes differ nothing lies in the pool as it shall lie at the target; where a rank of the target has few of the heads,
what it gets of each block is too short a run to be written by itself (`path.py`). There the tokens are gathered into the target's own
layout, all that one of its ranks gets of a write side by side, and written as whole blocks from there.
"""

from bisect import insort
from typing import Protocol

import numpy as np

from disaggd.errors import ConfigError
from disaggd.model.spec import DTYPE_BYTES
from disaggd.transfer.layout import KVPath, KVSpec, Span, head_bytes
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pool import Descriptors, Region
from disaggd.transfer.source import Load
from disaggd.units import MAX_BLOCK_SIZE

WRITES_AT_ONCE = 8
"""Each is a layer or so: while one is on the wire the next are made."""


class Repacker(Protocol):
    """Makes blocks of other layouts from the pool's, in memory of the host."""

    @property
    def region(self) -> Region:
        """That memory."""

    def repack(self, offset: int, target: KVSpec, layers: range, heads: range, span: Span) -> IsReady:
        """Make the blocks of `target` that hold `span`, which begins the first of them, `offset` bytes into the memory.

        There they are [layers, blocks, heads, bytes of a head in a block]. `heads` are counted from the first in the pool. Behind the
        last token is anything. Made in the order of the calls.
        """


class StagingRoom:
    """Which bytes of the staging memory are free: the lowest are taken first, so that no more memory is touched than is needed at once."""

    def __init__(self, num_bytes: int) -> None:
        self._free = [(0, num_bytes)]
        """From, to; in order, and no two of them touch."""

    def take(self, num_bytes: int, step: int) -> int | None:
        """Where there are so many bytes on end, from a multiple of `step` on; None: nowhere."""
        for index, (start, stop) in enumerate(self._free):
            offset = -(-start // step) * step
            if stop - offset >= num_bytes:
                rest = [(start, offset), (offset + num_bytes, stop)]
                self._free[index : index + 1] = [piece for piece in rest if piece[0] < piece[1]]
                return offset
        return None

    def give_back(self, offset: int, num_bytes: int) -> None:
        insort(self._free, (offset, offset + num_bytes))
        index = self._free.index((offset, offset + num_bytes))
        for left in (index, index - 1):  # the later neighbour first: the earlier one's index stays what it is
            if 0 <= left < len(self._free) - 1 and self._free[left][1] == self._free[left + 1][0]:
                self._free[left : left + 2] = [(self._free[left][0], self._free[left + 1][1])]


class Repacked:
    """What one rank of a peer gets, `heads` of the pool's, in blocks of `target`. All of them share one memory, and its `room`."""

    path: KVPath = "repacked"

    def __init__(self, repacker: Repacker, room: StagingRoom, heads: range, target: KVSpec) -> None:
        [group] = target.groups
        region, length = repacker.region, len(heads) * group.head_bytes
        self.registered = Descriptors(region, 0, length, length, region.num_bytes // length)
        self._repacker = repacker
        self._room = room
        self._heads = heads
        self._target = target

    def load(self, layers: range, span: Span) -> Load | None:
        count, length = len(layers) * self._target.blocks_for(span.num_tokens), self.registered.length
        assert 0 < count <= self.registered.count, f"{count} blocks at once, of {self.registered.count} that there is room for"
        offset = self._room.take(count * length, length)
        if offset is None:
            return None
        is_ready = self._repacker.repack(offset, self._target, layers, self._heads, span)
        first, made_bytes = offset // length, count * length if is_ready is at_once else 0
        return Load(np.arange(first, first + count, dtype=np.int32), is_ready, made_bytes)

    def unload(self, load: Load) -> None:
        """What was not made yet is made before anything that takes its place."""
        length = self.registered.length
        self._room.give_back(int(load.indices[0]) * length, len(load.indices) * length)


def check_made(target: KVSpec) -> None:
    """Raises ConfigError where `target`, which came over the wire, does not say of itself what its blocks are made as."""
    made = head_bytes(target.dtype, target.block_size, target.head_dim)
    for group in target.groups:
        if group.head_bytes != made:
            raise ConfigError(f"head_bytes are {group.head_bytes}, and {made} in {target.dtype} blocks of {target.block_size} tokens")


def check_room(num_bytes: int, heads: range, target: KVSpec, num_layers: int, num_tokens: int) -> None:
    """Raises ConfigError where the staging memory does not hold a write of so many layers and tokens to a rank that gets so many heads."""
    length = len(heads) * target.groups[0].head_bytes
    blocks = min(num_layers, target.num_layers) * target.blocks_for(num_tokens)
    if num_bytes // length < blocks:
        least = blocks * length
        raise ConfigError(f"transfer.staging: {num_bytes:,} bytes are less than one write takes in other blocks; it must have {least:,}")


def room_bytes(held: KVSpec, max_layers: int, max_tokens: int) -> int:
    """What the largest writes of a rank take that may be under way at once without waiting for room: WRITES_AT_ONCE, in float32."""
    [group] = held.groups
    token_bytes = group.kv_heads * 2 * held.head_dim * DTYPE_BYTES["float32"]
    return WRITES_AT_ONCE * min(max_layers, held.num_layers) * (max_tokens + MAX_BLOCK_SIZE) * token_bytes
