"""How rows of logits are drawn from: what every sampler is given. Plain tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How each row of logits is drawn from; tensors [rows] on the device of the logits."""

    temperatures: Tensor
    """float32; 0 is greedy."""
    top_k: Tensor
    """int32; 0 keeps all."""
    top_p: Tensor
    """float32; 1 keeps all."""
    floors: Tensor
    """float32: scores below are dropped; `log(min_p)`, and never less than where noise could still win."""
    seeds: Tensor
    """int64: the 64 bits of the seed."""
    positions: Tensor
    """int64: index in its sequence of the token that is drawn."""
    any_top_k: bool
    any_top_p: bool
    """Whether any row has one: told by the host, which knows."""

    def check(self, rows: int) -> None:
        """That kernels may read the tensors as they lie."""
        floats, ints = (self.temperatures, self.top_p, self.floors), (self.seeds, self.positions)
        assert all(tensor.dtype == torch.float32 for tensor in floats) and self.top_k.dtype == torch.int32
        assert all(tensor.dtype == torch.int64 for tensor in ints)
        assert all(tensor.shape == (rows,) and tensor.is_contiguous() for tensor in (*floats, *ints, self.top_k))
