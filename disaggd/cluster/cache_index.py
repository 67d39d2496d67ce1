"""Which node holds which cached block, from what the nodes themselves say. Runs on the router's loop.

A node tells of its cache in numbered `CacheEvents`. One that is out of turn makes all that was known of the node
doubtful: until its snapshot comes it counts as holding nothing, which costs a prefill and never a wrong answer.

Keyed by block hash alone: model, dtype, block size and salt are in the hash, so nodes that differ in them share no key.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from disaggd.cluster.protocol import CacheEvents
from disaggd.ids import BlockHash, NodeName
from disaggd.prefix import HASH_BYTES


@dataclass(slots=True)
class _Holder:
    """One node's link."""

    bit: int
    num_held: int = 0
    expected: int | None = 0
    """Number of its next events; None while only a snapshot is of use."""


class CacheIndex:
    """Block hash → bitmask of the nodes that hold it. As large as what the nodes hold together.

    Shorter hashes than those of 16 bytes, which travel, are for tests.
    """

    def __init__(self, hash_bytes: int = HASH_BYTES) -> None:
        self._hash_bytes = hash_bytes
        self._masks: dict[BlockHash, int] = {}
        self._holders: dict[NodeName, _Holder] = {}

    def __len__(self) -> int:
        """Distinct blocks that some node holds."""
        return len(self._masks)

    def num_held(self, node: NodeName) -> int:
        """Blocks that `node` is known to hold."""
        return self._holders[node].num_held if node in self._holders else 0

    def node_up(self, node: NodeName) -> None:
        """A new link: nothing is known to be there before the node says so."""
        self.node_down(node)
        taken = {holder.bit for holder in self._holders.values()}
        bit = next(bit for bit in range(len(taken) + 1) if 1 << bit not in taken)
        self._holders[node] = _Holder(1 << bit)

    def node_down(self, node: NodeName) -> None:
        """It holds nothing any more that could be used. Harmless for a node that is not up."""
        if (holder := self._holders.pop(node, None)) is not None:
            self._clear(holder)

    def on_events(self, node: NodeName, events: CacheEvents) -> bool:
        """What `node` stored and evicted. Returns whether a snapshot must be asked of it: once, and then it is waited for.

        Within one frame a block may be evicted and stored again, never the other way round.
        """
        holder = self._holders.get(node)
        if holder is None:
            return False  # its link is being lost right now
        if events.snapshot:
            self._clear(holder)
        elif events.number != holder.expected:
            return self._distrust(holder)
        holder.expected = events.number + 1
        self._remove(holder, self._split(events.evicted))
        self._add(holder, self._split(events.stored))
        return False

    def cached_blocks(self, hashes: Sequence[BlockHash]) -> dict[NodeName, int]:
        """For each node, how many of the leading `hashes` it holds: a cache is of use up to its first miss."""
        counts = dict.fromkeys(self._holders, 0)
        alive = sum(holder.bit for holder in self._holders.values())
        for count, block in enumerate(hashes):
            held = alive & self._masks.get(block, 0)
            if held != alive:
                self._note(counts, alive & ~held, count)
            alive = held
            if not alive:
                return counts
        self._note(counts, alive, len(hashes))
        return counts

    def _note(self, counts: dict[NodeName, int], mask: int, count: int) -> None:
        for node, holder in self._holders.items():
            if holder.bit & mask:
                counts[node] = count

    def _distrust(self, holder: _Holder) -> bool:
        """Events are out of turn. Returns whether they are the first: else a snapshot is on its way."""
        is_known = holder.expected is not None
        holder.expected = None
        self._clear(holder)
        return is_known

    def _add(self, holder: _Holder, blocks: Iterable[BlockHash]) -> None:
        masks, bit = self._masks, holder.bit
        for block in blocks:
            mask = masks.get(block, 0)
            if not mask & bit:
                masks[block] = mask | bit
                holder.num_held += 1

    def _remove(self, holder: _Holder, blocks: Iterable[BlockHash]) -> None:
        masks, bit = self._masks, holder.bit
        for block in blocks:
            mask = masks.get(block, 0)
            if not mask & bit:
                continue
            holder.num_held -= 1
            if mask == bit:
                del masks[block]
            else:
                masks[block] = mask & ~bit

    def _clear(self, holder: _Holder) -> None:
        """Walks the whole index: what a node holds is not kept twice for the sake of a rare loss."""
        if holder.num_held:
            bit = holder.bit
            self._masks = {block: mask & ~bit for block, mask in self._masks.items() if mask != bit}
            holder.num_held = 0

    def _split(self, raw: bytes) -> Iterator[BlockHash]:
        return (BlockHash(raw[start : start + self._hash_bytes]) for start in range(0, len(raw), self._hash_bytes))
