"""What stands before vLLM's 1P1D: each prompt goes to the prefill server, then, with what that says of its KV, to the decode server.

    python bench/nixl_proxy.py PORT PREFILL_PORT DECODE_PORT

One asyncio thread that parses no event and copies bytes, so that it costs vLLM as little as a proxy can. Of HTTP it knows requests with a
length and replies that end with the connection.
"""

import asyncio
import contextlib
import re
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
import uvloop

_OPEN = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_LOST = b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_CHUNK = 65_536
_TO_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


async def main(port: int, prefill_port: int, decode_port: int) -> None:
    handle = partial(_serve, prefill_port=prefill_port, decode_port=decode_port)
    server = await asyncio.start_server(handle, "127.0.0.1", port)
    await server.serve_forever()


async def _serve(reader: StreamReader, writer: StreamWriter, prefill_port: int, decode_port: int) -> None:
    """One request; its connection is closed after the reply."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            writer.write(_OPEN)
        else:
            await _complete(_path(head), await reader.readexactly(_length(head)), writer, prefill_port, decode_port)
        await writer.drain()
    except (OSError, EOFError):
        writer.write(_LOST)
    finally:
        writer.close()


async def _complete(path: str, body: bytes, client: StreamWriter, prefill_port: int, decode_port: int) -> None:
    asked: dict[str, Any] = msgspec.json.decode(body)
    first = {key: value for key, value in asked.items() if key != "stream_options"}
    async with _posted(prefill_port, path, first | {"stream": False, "max_tokens": 1, "kv_transfer_params": _TO_DECODE}) as reply:
        raw = await reply.read()
    head, _, said = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        client.write(raw)
        return
    where = msgspec.json.decode(said)["kv_transfer_params"]
    async with _posted(decode_port, path, asked | {"kv_transfer_params": where}) as reply:
        while chunk := await reply.read(_CHUNK):
            client.write(chunk)
            await client.drain()


@contextlib.asynccontextmanager
async def _posted(port: int, path: str, asked: dict[str, Any]) -> AsyncIterator[StreamReader]:
    """What the server replies, head and all."""
    body = msgspec.json.encode(asked)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{port}", "content-type: application/json", f"content-length: {len(body)}"]
        writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
        yield reader
    finally:
        writer.close()


def _path(head: bytes) -> str:
    return head.split(b" ", 2)[1].decode()


def _length(head: bytes) -> int:
    found = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    if found is None:
        raise EOFError("a request without a length")
    return int(found[1])


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:4])))
