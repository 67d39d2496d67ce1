"""Kernels that begin while the one before them ends: CUDA's programmatic dependent launch, from Hopper on.

A decode step is hundreds of kernels of a few microseconds, each of which would wait for the last program of the one before and then start
from nothing. A chained kernel is launched as soon as all programs of its predecessor run; it may read what no kernel writes (weights), then
waits until its predecessor has ended and everything before that too. So every program of a chained kernel must wait before it reads, writes
or returns, or a kernel after it could run ahead of one before it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from functools import cache
from typing import Any

import triton
import triton.language as tl

from disaggd.kernels.pool import INTERPRETED

_FIRST_ARCHITECTURE = 90


@triton.jit
def let_next_start(CHAINED: tl.constexpr):
    """The next kernel of the stream may be launched."""
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(CHAINED: tl.constexpr):
    """What the kernels before wrote can be read from here on."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@cache
def chained() -> dict[str, Any]:
    """The options of a chained launch, CHAINED among them; on a device or in an interpreter that knows no chains, of a plain one."""
    if INTERPRETED or triton.runtime.driver.active.get_current_target().arch < _FIRST_ARCHITECTURE:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
