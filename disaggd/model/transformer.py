"""The model: a batch of tokens and a KV pool in, logits out. Runs on the compute thread; everything it needs is passed in.

Knows nothing of files (`weights.py` fills its tensors) nor of which tokens come next (`engine/sampler.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, device

from disaggd.kernels import FusedLayers, Ops
from disaggd.model.batch import Batch
from disaggd.model.layers import MLP, Attention, HeadNorm, Layer, Linear, RMSNorm, Rotation, inverse_frequencies, rotation_of
from disaggd.model.parallel import Alone, Part, Ranks, part_of
from disaggd.model.spec import ModelSpec

LayersDone = Callable[[range], None]

ComputeLayers = Callable[[range, Tensor | None, Tensor, Rotation], Tensor | None]
"""(layers, what the layer before them returned, the residual stream that they change, rotation) → what the last of them adds to it."""


class Transformer:
    """A dense decoder-only transformer, or one rank's part of it. Made with uninitialized weights; fill them, then `pack`, then `forward`.

    `layer_group`: after so many layers `forward` reports that their keys and values are in the pool.
    """

    def __init__(
        self, spec: ModelSpec, where: device, ops: Ops, layer_group: int = 4, part: Part | None = None, ranks: Ranks | None = None
    ) -> None:
        self.spec = spec
        self.part = part or part_of(spec)
        self.ranks: Ranks = ranks or Alone()
        """Those that compute the model together."""
        self._widths = [len(part_of(spec, rank, self.part.num_ranks).vocabulary) for rank in range(self.part.num_ranks)]
        self.device = where
        self.layer_group = layer_group
        self.ops = ops
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        num_words = len(self.part.vocabulary)
        self.embedding = self._empty(num_words, spec.hidden_size)
        self.layers = tuple(self._layer() for _ in range(spec.num_layers))
        self.norm = self._norm()
        self.head = Linear(ops, self.embedding if spec.tie_word_embeddings else self._empty(num_words, spec.hidden_size), None)
        self._fused: FusedLayers | None = None
        self._frequencies = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling).to(where)

    def pack(self) -> None:
        """Bring the filled weights into the layout that computes fastest, one at a time. A tied head becomes a copy of its own."""
        for layer in self.layers:
            for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
                linear.pack()
        self.head.pack()
        if self.part.num_ranks == 1:  # else the ranks' shares are added up within each layer
            self._fused = self.ops.fuse([layer.weights for layer in self.layers], self.spec.sliding_window)

    def forward(self, batch: Batch, kv: Tensor, layers_done: LayersDone | None = None) -> Tensor:
        """Logits float32 [len(batch.logit_rows), vocab_size]; the keys and values of all tokens of `batch` are written into `kv`.

        `kv` [layers, num_blocks, kv_heads, 2, block_size, head_dim] holds those of the tokens before. `layers_done(range(a, b))` is
        called in order for consecutive groups of layers, once this batch's keys and values of layers a to b − 1 are in `kv`; for all layers
        at once where every sequence has one new token and the layers are one operation.
        Of several ranks each is given the same batch, and its own heads' `kv`; the first returns the logits, the others those of their
        parts of the vocabulary.
        Call under `torch.inference_mode()`.
        """
        residual = self._embed(batch.tokens)
        rotation = rotation_of(batch.positions, self._frequencies, self._dtype)
        x = self._layers_of(batch, residual, rotation, kv, layers_done)
        if len(batch.logit_rows) < len(batch.tokens):
            x, residual = x[batch.logit_rows], residual[batch.logit_rows]
        return self.ranks.collect(self.head(self.norm(x, residual)), self._widths).float()

    def _embed(self, tokens: Tensor) -> Tensor:
        """[num_tokens, hidden]. Words of another rank's part of the vocabulary are zero here, and come with the sum."""
        if self.part.num_ranks == 1:
            return F.embedding(tokens, self.embedding)
        words = tokens - self.part.vocabulary.start
        is_here = (words >= 0) & (words < len(self.part.vocabulary))
        return self.ranks.sum(F.embedding(words.where(is_here, 0), self.embedding) * is_here[:, None])

    def _layers_of(self, batch: Batch, residual: Tensor, rotation: Rotation, kv: Tensor, layers_done: LayersDone | None) -> Tensor:
        """`residual` goes through the layers in place; returns what the last one adds to it."""
        fused = self._fused if self._fused is not None and len(batch.tokens) <= self._fused.max_rows else None
        compute = self._one_by_one(batch, kv) if fused is None else _at_once(fused, batch, kv)
        is_one_group = fused is not None and (layers_done is None or len(batch.tokens) == len(batch.context_lens))
        x = None
        for group in [range(len(self.layers))] if is_one_group else self._layer_groups():
            x = compute(group, x, residual, rotation)
            if layers_done is not None:
                layers_done(group)
        assert x is not None, "a model without layers"
        return x

    def _one_by_one(self, batch: Batch, kv: Tensor) -> ComputeLayers:
        attention = self.ops.paged_attention(
            batch.slot_mapping,
            batch.query_start,
            batch.context_lens,
            batch.block_tables,
            kv_heads=len(self.part.kv_heads),
            block_size=kv.shape[4],
            window=self.spec.sliding_window,
        )

        def compute(layers: range, x: Tensor | None, residual: Tensor, rotation: Rotation) -> Tensor | None:
            for index in layers:
                x = self.layers[index](x, residual, rotation, attention, kv[index])
            return x

        return compute

    def _layer_groups(self) -> list[range]:
        count = len(self.layers)
        return [range(first, min(first + self.layer_group, count)) for first in range(0, count, self.layer_group)]

    # ── allocation ──

    def _layer(self) -> Layer:
        spec, part, size = self.spec, self.part, self.spec.head_dim
        attention = Attention(
            qkv=self._linear(spec.hidden_size, (len(part.heads) + 2 * len(part.kv_heads)) * size, spec.qkv_bias),
            out=self._linear(len(part.heads) * size, spec.hidden_size, spec.output_bias and part.adds_biases),
            head_norm=self._head_norm() if spec.qk_norm else None,
        )
        mlp = MLP(
            self.ops,
            gate_up=self._linear(spec.hidden_size, 2 * len(part.neurons), spec.mlp_bias),
            down=self._linear(len(part.neurons), spec.hidden_size, spec.mlp_bias and part.adds_biases),
        )
        return Layer(self._norm(), attention, self._norm(), mlp, self.ranks)

    def _linear(self, inputs: int, outputs: int, bias: bool) -> Linear:
        return Linear(self.ops, self._empty(outputs, inputs), self._empty(outputs) if bias else None)

    def _norm(self) -> RMSNorm:
        return RMSNorm(self.ops, self._empty(self.spec.hidden_size), self.spec.rms_norm_eps)

    def _head_norm(self) -> HeadNorm:
        num_heads = len(self.part.heads) + len(self.part.kv_heads)
        return HeadNorm(self._empty(num_heads, self.spec.head_dim), self.spec.rms_norm_eps)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self.device)


def _at_once(fused: FusedLayers, batch: Batch, kv: Tensor) -> ComputeLayers:
    tables = batch.slot_mapping, batch.query_start, batch.context_lens, batch.block_tables
    return lambda layers, x, residual, rotation: fused(layers, x, residual, rotation, kv, *tables)
