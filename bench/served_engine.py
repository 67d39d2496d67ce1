"""The engine alone, in a process of its own on its own processors: what a served one is compared with. Started by `served.py`.

argv: the file descriptor of a pipe. The first message is a `Setup`, answered when the engine is loaded; then each `Steps` is
answered by the seconds that each of them took.
"""

import gc
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec
from machine import measure_as_nodes_do


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    pool_tokens: int
    max_step_tokens: int
    max_sequences: int
    cpus: tuple[int, ...]


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """Decode steps to be timed."""

    batch: int
    context: int
    """Tokens of each sequence before the first of them."""
    count: int


def serve(pipe: Connection) -> None:
    from contenders import Ours  # noqa: PLC0415  imports torch, which `served.py`, the client, does without

    setup: Setup = pipe.recv()
    os.sched_setaffinity(0, setup.cpus)
    limits = {"max_step_tokens": setup.max_step_tokens, "max_sequences": setup.max_sequences}
    engine = Ours(setup.path, "cpu", pool_tokens=setup.pool_tokens, **limits)
    gc.collect()
    gc.freeze()  # as nodes do
    pipe.send(None)
    while True:
        wanted: Steps = pipe.recv()
        engine.begin(wanted.batch, wanted.context, wanted.count + 1)
        engine.step()  # warms up
        pipe.send([_timed(engine.step) for _ in range(wanted.count)])
        engine.end()


def _timed(step: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    step()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    measure_as_nodes_do(threads=int(sys.argv[2]))
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)
