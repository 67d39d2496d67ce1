"""What a load client asks for: prompts, output lengths and arrival times, drawn, or replayed from a trace. Pure.

Everything is drawn from one seed, so that two servers get the same requests.
"""

import random
from itertools import accumulate

import msgspec

from disaggd.simulator.traces import Lengths, Scale


class Planned(msgspec.Struct, frozen=True):
    """One request to send."""

    arrival_s: float
    """After the run's begin; a closed loop does not look at it."""
    prompt: list[int]
    max_tokens: int


def fixed(num_requests: int, num_input: int, num_output: int) -> list[Lengths]:
    return [Lengths(num_input=num_input, num_output=num_output)] * num_requests


def poisson(rows: list[Lengths], rate: float, seed: int) -> list[Lengths]:
    """The same rows, arriving at random, `rate` a second."""
    draw = random.Random(seed)
    arrivals = accumulate(draw.expovariate(rate) for _ in rows)
    return [msgspec.structs.replace(row, arrival_s=at) for row, at in zip(rows, arrivals, strict=True)]


def plan(rows: list[Lengths], vocab_size: int, length_scale: float, seed: int) -> list[Planned]:
    """Prompts of random tokens; rows that share leading blocks share them."""
    draw = random.Random(seed)
    block_size = Scale(length=length_scale).block

    def prompt(row: Lengths) -> list[int]:
        if not row.blocks:
            return _tokens(draw, row.num_input, vocab_size)
        shared = [token for block in row.blocks for token in _tokens(random.Random(f"{seed}-{block}"), block_size, vocab_size)]
        return (shared + _tokens(draw, max(0, row.num_input - len(shared)), vocab_size))[: row.num_input]

    return [Planned(row.arrival_s, prompt(row), row.num_output) for row in rows]


def _tokens(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    """Never 0, which ends a text in many vocabularies."""
    return [draw.randrange(1, vocab_size) for _ in range(count)]
