"""A server's process for the length of a measurement: started, waited for, ended with all that it started. Knows no server by name."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_STOP_S = 20.0


@contextlib.contextmanager
def serving(
    command: Sequence[str], ready_url: str | None, log: Path, *, environment: Mapping[str, str] | None = None, start_s: float = 120.0
) -> Iterator[int]:
    """The process's pid once `ready_url` is a 200. RuntimeError if it is not within `start_s`.

    An exception in the body is noted the end of the log.

    None: at once, for a process whose readiness another one tells. A bench that is told to stop ends it first.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that what outlives it can be found
        )
    try:
        if ready_url is not None:
            _wait_ready(ready_url, process, start_s)
        yield process.pid
    except Exception as error:
        error.add_note(f"{log.name} ends with:\n{log.read_text(errors='replace')[-2000:]}")
        raise
    finally:
        _end(process)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def get(url: str) -> bytes:
    """The body of a 200; OSError for anything else."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        return bytes(reply.read())


def answers(url: str) -> bool:
    """Whether a GET of `url` is a 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:  # urllib's own errors are among them
        return False


def _wait_ready(url: str, process: subprocess.Popen[bytes], start_s: float) -> None:
    deadline = time.monotonic() + start_s
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with contextlib.suppress(ProcessLookupError):  # as it should be: nothing of its session is left
        os.killpg(process.pid, signal.SIGKILL)
