"""The pattern of `transfer/pattern.py` in blocks of the KV pool, of one rank and of all. Runs on the compute thread.

To fill two blocks of 64 tokens, and to compare them, takes a core 1 ms each for the built-in model, 3 and 5 ms for 12 layers of four heads
of 64; one block of a model of 8 billion parameters (8 MB) 10 and 20 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from disaggd.ids import BlockId
from disaggd.transfer.pattern import Mismatch, Pattern, block_pattern, first_mismatch


class PatternMemory:
    """`kv` [layers, num_blocks, heads, 2, block_size, head_dim] is the pool of a rank that holds these `heads` of all."""

    def __init__(self, kv: Tensor, heads: range) -> None:
        assert kv.shape[2] == len(heads)
        self._kv = kv
        self._heads = heads

    def fill(self, blocks: Sequence[BlockId], salt: int) -> None:
        """Write the pattern into `blocks`, in their order; a GPU is asked to. Nobody else may hold them."""
        self._kv[:, list(blocks)] = self._as_held(self._pattern(len(blocks), salt))

    def compare(self, blocks: Sequence[BlockId], num_tokens: int, salt: int) -> Mismatch | None:
        """Whether `blocks` hold the pattern's first `num_tokens`, byte by byte; None if they do. Waits for a GPU.

        What is behind those in the last block may be anything.
        """
        pattern = self._pattern(len(blocks), salt)
        found = self._kv[:, list(blocks)]
        word, block_size = _WORDS[found.itemsize], found.shape[4]
        is_wrong = found.view(word) != self._as_held(pattern).view(word)
        is_wrong[:, -1, :, :, num_tokens - (len(blocks) - 1) * block_size :] = False
        if not is_wrong.any():
            return None
        return first_mismatch(found.double().cpu().numpy(), pattern, is_wrong.cpu().numpy(), self._heads, num_tokens)

    def _pattern(self, num_blocks: int, salt: int) -> Pattern:
        layers, _, _, _, block_size, head_dim = self._kv.shape
        return block_pattern(layers, num_blocks, self._heads, block_size, head_dim, salt)

    def _as_held(self, pattern: Pattern) -> Tensor:
        return torch.from_numpy(pattern).to(self._kv.device).to(self._kv.dtype)


_WORDS = {2: torch.int16, 4: torch.int32}
"""To compare bytes: -0 is not 0, and no number is itself."""


@dataclass(frozen=True, slots=True)
class FillBlocks:
    """Rank 0 → another: write your heads of the pattern into these blocks. Answered None, when your device has."""

    blocks: tuple[BlockId, ...]
    salt: int


@dataclass(frozen=True, slots=True)
class CompareBlocks:
    """Rank 0 → another: look whether they hold your heads of it. Answered with what does not, or None."""

    blocks: tuple[BlockId, ...]
    num_tokens: int
    salt: int


PatternOrder = FillBlocks | CompareBlocks


def obey(memory: PatternMemory, order: PatternOrder) -> Mismatch | None:
    """A rank's answer to `order`."""
    if isinstance(order, CompareBlocks):
        return memory.compare(order.blocks, order.num_tokens, order.salt)
    memory.fill(order.blocks, order.salt)
    return None


class OtherRanks(Protocol):
    """Ranks 1 … n−1 of a node: `Followers`."""

    def order(self, order: PatternOrder) -> None:
        """Tell every rank, in order with the steps that it computes. Raises RankLost."""

    def answers(self) -> list[Mismatch | None]:
        """Of every rank to the last order. Raises RankLost."""


class RankPatterns:
    """All ranks of a node. Both calls wait until every other rank has done its part, its device too, and raise RankLost if one does not.

    The first rank's device may still be filling: of that its own `DeviceStream` tells.
    """

    def __init__(self, own: PatternMemory, others: OtherRanks | None = None) -> None:
        self._own = own
        self._others = others

    def fill(self, blocks: Sequence[BlockId], salt: int) -> None:
        """Write the pattern into `blocks`, in their order, each rank its heads."""
        self._on_all(FillBlocks(tuple(blocks), salt))

    def compare(self, blocks: Sequence[BlockId], num_tokens: int, salt: int) -> list[Mismatch | None]:
        """By rank what is not the pattern's first `num_tokens` in `blocks`; None where all is."""
        return self._on_all(CompareBlocks(tuple(blocks), num_tokens, salt))

    def _on_all(self, order: PatternOrder) -> list[Mismatch | None]:
        if self._others is None:
            return [obey(self._own, order)]
        self._others.order(order)
        return [obey(self._own, order), *self._others.answers()]
