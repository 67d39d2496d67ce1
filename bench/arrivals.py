"""Streamed requests by when the kernel says that their events arrived, for a client that must cost little. Parses only the ends of events.

One thread, which looks once in a while at all sockets: waiting for each event instead would bill the server for waking it, which on a
virtual machine costs as much as sending. How late it reads does not count.
"""

import re
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Self

from client import Target

EVENT_END = b"\n\n"
_STALL_S = 60.0
_SO_TIMESTAMPNS = 35
"""Linux: with what `recvmsg` brings comes the CLOCK_REALTIME of its last packet's arrival."""
_TIMESPEC = struct.Struct("qq")
_HEAD_BYTES = 500


class Stream:
    """One request's socket. For each event that has ended, in seconds of CLOCK_REALTIME:"""

    def __init__(self, target: Target, body: bytes) -> None:
        self.event_s: list[float] = []
        """its arrival here; of those that one read brought, the last one's,"""
        self.read_s: list[float] = []
        """and its reading."""
        self.sent_s = time.time()
        self.head = b""
        """How the reply begins, for those who must say what is wrong with it."""
        self.is_open = True
        self.socket = socket.create_connection((target.host, target.port))
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.socket.sendall(target.request(body))
        self.socket.setblocking(False)
        self._ends_open = False
        """The last read ended in the first half of an event's end."""

    def read(self) -> None:
        """Take what is there, and close after the server has. RuntimeError where the kernel gives no times."""
        data, notes, _, _ = self.socket.recvmsg(65536, 64)
        now_s = time.time()
        if not data:
            self.close()
            return
        if not notes:
            raise RuntimeError("the kernel does not say when data came (SO_TIMESTAMPNS)")
        seconds, nanoseconds = _TIMESPEC.unpack(notes[0][2])
        num_events = data.count(EVENT_END) + (self._ends_open and data.startswith(b"\n"))
        self._ends_open = data.endswith(b"\n") and not data.endswith(EVENT_END)
        self.event_s.extend([seconds + nanoseconds / 1e9] * num_events)
        self.read_s.extend([now_s] * num_events)
        self.head += data[: _HEAD_BYTES - len(self.head)]

    @property
    def request_id(self) -> str:
        """RuntimeError for a reply that is none of ours."""
        if (found := re.search(rb"^x-request-id: (\S+)\r$", self.head, re.IGNORECASE | re.MULTILINE)) is None:
            raise RuntimeError(f"a reply without a request id: {self.head!r}")
        return found[1].decode()

    def close(self) -> None:
        self.is_open = False
        self.socket.close()


class Listener:
    """The sockets that are read, all on the caller's thread; none is open after the `with`."""

    def __init__(self, look_s: float = 0.001) -> None:
        """`look_s`: between two looks at the sockets."""
        self._look_s = look_s
        self._poll = select.epoll()
        self._streams: dict[int, Stream] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in list(self._streams.values()):
            self.close(stream)
        self._poll.close()

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def open(self, target: Target, body: bytes) -> Stream:
        """Send a request."""
        stream = Stream(target, body)
        self._streams[stream.socket.fileno()] = stream
        self._poll.register(stream.socket, select.EPOLLIN)
        return stream

    def close(self, stream: Stream) -> None:
        """Also before its end: the server finds its client gone."""
        if stream.is_open:
            del self._streams[stream.socket.fileno()]
            stream.close()

    def listen(self, until: Callable[[], bool]) -> None:
        """Read what comes until a look finds `until` true. TimeoutError when streams are open and nothing comes for a while."""
        heard_s = time.monotonic()
        while not until():
            time.sleep(self._look_s)
            ready = self._poll.poll(0)
            for number, _ in ready:
                stream = self._streams[number]
                stream.read()
                if not stream.is_open:  # its number is free for the next one
                    del self._streams[number]
            heard_s = time.monotonic() if ready or not self._streams else heard_s
            if time.monotonic() - heard_s > _STALL_S:
                raise TimeoutError(f"{len(self._streams)} streams are open, and nothing came for {_STALL_S:.0f} s")
