"""Clients that misbehave, and far too many of them: the others get what they asked for, and nothing is left of it all."""

import asyncio
import json
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.clusters import Cluster, running, wait_until
from tests.support.completions import InBackground, check
from tests.support.oracle import Oracle, prompt_of

pytestmark = pytest.mark.process

NUM_LEAVING, NUM_SLOW, NUM_IDLE, NUM_GOOD = 30, 4, 20, 8
NUM_FLOOD = 200
MAX_REQUESTS = 60
FREED_S = 10.0
PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that loses its patience soon."""
    impatient = {"head_timeout_s": 2.0, "client_stall_s": 2.0, "max_unread_tokens": 256, "max_requests": MAX_REQUESTS}
    with running(Cluster(tmp_path_factory.mktemp("strict"), router=impatient)) as cluster:
        yield cluster


def open_files(cluster: Cluster) -> int:
    return sum(1 for _ in Path(f"/proc/{cluster.nodes['router'].pid}/fd").iterdir())


def resident_mb(cluster: Cluster) -> float:
    statm = Path(f"/proc/{cluster.nodes['router'].pid}/statm").read_text()
    return int(statm.split()[1]) * PAGE_KB / 1024


def post(prompt: list[int], **options: Any) -> bytes:
    raw = json.dumps({"model": "tiny", "prompt": prompt, "stream": True, "ignore_eos": True, **options}).encode()
    return f"POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


async def leave_at_some_point(port: int, request: bytes, bytes_sent: int, bytes_read: int) -> None:
    """In the middle of the request, or of the reply; or before either."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request[:bytes_sent])
    if bytes_sent == len(request):
        await reader.read(bytes_read)
    writer.transport.abort()


async def read_nothing(port: int, request: bytes) -> None:
    """Until the router cuts the connection; its head is all that is ever read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, request)
    assert await loop.sock_recv(client, 12) == b"HTTP/1.1 200"
    with client:
        while client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:  # noqa: ASYNC110  a socket that is not read tells nothing else
            await asyncio.sleep(0.05)


async def say_nothing(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.read()
    writer.close()


async def misbehave(port: int, oracle: Oracle) -> None:
    draw = random.Random(7)
    async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
        for salt in range(NUM_LEAVING):
            request = post(prompt_of(draw.choice((40, 300)), oracle, salt=salt), max_tokens=500)
            bytes_sent = draw.choice((0, len(request) // 2, len(request), len(request)))
            clients.create_task(leave_at_some_point(port, request, bytes_sent, draw.choice((1, 2000))))
        for salt in range(NUM_SLOW):
            clients.create_task(read_nothing(port, post(prompt_of(30, oracle, salt=salt), max_tokens=3000, logprobs=5)))
        for _ in range(NUM_IDLE):
            clients.create_task(say_nothing(port))


def test_clients_that_misbehave_cost_the_others_nothing_and_leave_nothing(strict: Cluster, oracle: Oracle) -> None:
    before = open_files(strict)
    options = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
    work = [(prompt_of(50 + 100 * (i % 3), oracle, salt=i), options) for i in range(NUM_GOOD)]
    good = InBackground(strict, work)
    asyncio.run(misbehave(strict.nodes["router"].port, oracle))
    for reply, (prompt, asked) in zip(good.replies(), work, strict=True):
        check(reply, prompt, asked, oracle)
    strict.wait_idle(FREED_S)
    slow = strict.metric("disaggd_slow_clients_total")
    assert slow["head",] >= NUM_IDLE
    assert slow["unread",] + slow.get(("stalled",), 0) >= NUM_SLOW
    assert slow["stalled",] == NUM_SLOW, "each connection was cut"
    wait_until("their connections are closed", lambda: open_files(strict) <= before + 1, FREED_S)  # one is the question's own


def flood_bodies(oracle: Oracle, turn: int) -> list[bytes]:
    """Made before, so that the client takes no time for it in between."""
    prompt = prompt_of(100, oracle, salt=turn)
    return [json.dumps({"model": "tiny", "prompt": [1 + i, *prompt], "max_tokens": 4}).encode() for i in range(NUM_FLOOD)]


async def flood(cluster: Cluster, bodies: list[bytes]) -> Counter[int]:
    """All at once; how often each status came."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=len(bodies))) as client:

        async def one(body: bytes) -> int:
            reply = await client.post(cluster.url + "/v1/completions", content=body)
            assert reply.status_code != 429 or int(reply.headers["retry-after"]) >= 1
            return reply.status_code

        return Counter(await asyncio.gather(*map(one, bodies)))


def test_a_flood_is_answered_and_leaves_nothing(strict: Cluster, oracle: Oracle) -> None:
    asyncio.run(flood(strict, flood_bodies(oracle, 1)))  # the first costs memory once: buffers, receipts, caches
    memory_mb = resident_mb(strict)
    statuses = asyncio.run(flood(strict, flood_bodies(oracle, 2)))
    assert statuses.keys() == {200, 429}, statuses
    assert statuses[200] >= MAX_REQUESTS
    strict.wait_idle(FREED_S)
    grown_mb = resident_mb(strict) - memory_mb
    print(f"{statuses}, {grown_mb:+.1f} MB")
    assert grown_mb < 8
    assert strict.metric("disaggd_open_requests")[()] == 0
