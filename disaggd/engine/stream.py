"""`DeviceStream`: how far the device that computes has come. A GPU computes on after the call that asked for it has returned.

Who needs to know asks, and nobody waits: blocks that a launched step still writes are the engine's until it has (`engine.py`).
"""

import torch

from disaggd.transfer.messages import IsReady, at_once


class DeviceStream:
    """What the compute thread asks of one device, in order. On a CPU everything is done when the call returns."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._is_gpu = where.type == "cuda"

    def enter(self) -> None:
        """To be called on each thread that touches the device, first of all: which one is current is a thread's own affair."""
        if self._is_gpu:
            torch.cuda.set_device(self._where)
            # That alone leaves a thread without a context if the device is the one it begins with; this makes it current.
            torch.cuda.synchronize(self._where)

    def mark(self) -> IsReady:
        """Whether what has been asked of the device so far is done. Compute thread; about 2 µs."""
        if not self._is_gpu:
            return at_once
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._where))
        return event.query
