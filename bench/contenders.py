"""The two that `engine.py` compares, behind one face: our engine, and transformers with the same weights.

Both live in one process, with the same malloc, OpenMP and threads. Neither knows of clocks or of the other.
"""

from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from disaggd.engine.build import build_engine
from disaggd.engine.engine import SequenceOutput
from disaggd.engine.sequence import Sequence
from disaggd.ids import SeqId
from disaggd.model.directory import open_directory
from disaggd.model.spec import ModelSpec, Weights
from disaggd.sampling import SamplingParams
from disaggd.transfer.layout import kv_spec

BLOCK_SIZE = 64
ATTENTIONS = ("eager", "sdpa")


class Contender(Protocol):
    """Everything returns when it is computed, on a GPU too."""

    def prefill(self, prompt: list[int]) -> None:
        """Compute a prompt, down to the token that follows."""

    def begin(self, batch: int, context: int, steps: int) -> None:
        """Get `batch` sequences whose `context` tokens are computed; up to `steps` will follow."""

    def step(self) -> None:
        """One greedy token for each of them."""

    def end(self) -> None:
        """Forget them."""


class Ours:
    """`disaggd`'s engine, as a decode node builds it, but for the pool's size and the step budget."""

    def __init__(
        self, path: str, device: str, *, pool_tokens: int, max_step_tokens: int, max_sequences: int, weights: Weights = "auto"
    ) -> None:
        layout = kv_spec(open_directory(path).spec("bfloat16"), BLOCK_SIZE)
        loaded = build_engine(
            path,
            dtype="bfloat16",
            weights=weights,
            device=device,
            kv_cache_bytes=layout.blocks_for(pool_tokens) * layout.bytes_per_block,
            block_size=BLOCK_SIZE,
            max_step_tokens=max_step_tokens,
            max_sequences=max_sequences,
        )
        self.spec: ModelSpec = loaded.spec
        self._engine = loaded.engine
        self._sequences: list[Sequence] = []
        # A prompt of noise is as good as any: what lies in the pool is what `begin` takes for computed.
        kv = loaded.rank.kv
        kv.copy_(torch.randn(1, 1, *kv.shape[2:]).to(kv).expand_as(kv))

    def prefill(self, prompt: list[int]) -> None:
        sequence = Sequence(SeqId("prefill"), list(prompt), _greedy(1), num_prompt_tokens=len(prompt))
        self._engine.add(sequence)
        while not sequence.is_finished:
            self._engine.step()

    def begin(self, batch: int, context: int, steps: int) -> None:
        for index in range(batch):
            tokens = [1 + index % 7] * context
            sequence = Sequence(SeqId(f"decode-{index}"), tokens, _greedy(steps + 1), num_prompt_tokens=context)
            self._engine.park(sequence)
            blocks = self._engine.pool.allocate(self._engine.pool.blocks_for(context + steps + 1))
            assert blocks is not None, "the pool was sized for fewer sequences"
            self._engine.resume(sequence, blocks, token=1)
            self._sequences.append(sequence)

    def step(self) -> None:
        outputs: list[SequenceOutput] = []
        while not outputs:  # on a GPU the first step only launches
            outputs = self._engine.step()
        assert len(outputs) == len(self._sequences), "a sequence had no place in the step"

    def end(self) -> None:
        for sequence in self._sequences:
            self._engine.abort(sequence)
        self._sequences.clear()


class Transformers:
    """The forward pass of transformers in a greedy loop: `generate` less its own bookkeeping, which is to its advantage."""

    def __init__(self, path: str, device: str) -> None:
        self._where = torch.device(device)
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model = model.to(device)
        self._cache = DynamicCache(config=self._model.config)
        self._tokens = torch.empty(0)

    def attend_by(self, attention: str) -> None:
        """`eager` or `sdpa`."""
        self._model.set_attn_implementation(attention)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        tokens = torch.tensor([prompt], device=self._where)
        logits = self._model(tokens, past_key_values=DynamicCache(config=self._model.config), use_cache=True, logits_to_keep=1).logits
        logits[:, -1].argmax(-1).tolist()

    @torch.inference_mode()
    def begin(self, batch: int, context: int, steps: int) -> None:
        config = self._model.config
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        self._cache = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            noise = torch.randn(1, *shape[1:], device=self._where).to(torch.bfloat16).expand(shape)
            self._cache.update(noise.clone(), noise.clone(), index)
        self._tokens = torch.ones(batch, 1, dtype=torch.int64, device=self._where)

    @torch.inference_mode()
    def step(self) -> None:
        logits = self._model(self._tokens, past_key_values=self._cache, use_cache=True).logits
        self._tokens = logits[:, -1:].argmax(-1)
        self._tokens.tolist()

    def end(self) -> None:
        self._cache = DynamicCache(config=self._model.config)


class TransformersBy:
    """One of `Transformers`' modes; all share its weights."""

    def __init__(self, shared: Transformers, attention: str) -> None:
        self._shared = shared
        self._attention = attention

    def prefill(self, prompt: list[int]) -> None:
        self._shared.attend_by(self._attention)
        self._shared.prefill(prompt)

    def begin(self, batch: int, context: int, steps: int) -> None:
        self._shared.attend_by(self._attention)
        self._shared.begin(batch, context, steps)

    def step(self) -> None:
        self._shared.step()

    def end(self) -> None:
        self._shared.end()


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
