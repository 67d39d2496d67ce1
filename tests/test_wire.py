"""Whatever is wrong with the bytes, it is one exception; and numbers that no honest peer means do not come in."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from disaggd.cluster.link import decode_from_node, decode_from_router
from disaggd.cluster.protocol import Abort, CacheEvents, Credit, Frame, JobEnded, PushPrefix, Released, TokenRun, Tokens, ToNode, ToRouter
from disaggd.ids import SeqId
from disaggd.wire import Undecodable
from tests.support.routing import KV, P0, grant_of, hello

S = SeqId("s")
GRANT = grant_of(b"token", P0, P0)


def encoded(frame: Frame) -> bytes:
    return msgspec.msgpack.encode(frame)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\x92\xa4Ping" + b"\x91" * 100_000,
        encoded(Released(S, 0, "why")).replace(b"why", b"\xffhy"),
        encoded(Released(S, 0, "why")).replace(b"why", b"\xed\xa0\x80"),
        encoded(Released(S, 0, "why"))[:-1],
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({"Ping": 1}),
        msgspec.msgpack.encode(["NoSuchFrame", 1]),
    ],
)
def test_every_fault_of_the_bytes_is_undecodable(raw: bytes) -> None:
    with pytest.raises(Undecodable):
        decode_from_node(raw)


@pytest.mark.parametrize(
    "frame",
    [
        Credit(-1),
        JobEnded(S, 0, True, "", -1, None, None),
        JobEnded(S, 0, True, "", 2**63, None, None),
        JobEnded(S, 0, True, "", 0, math.nan, None),
        JobEnded(S, 0, True, "", 0, None, math.inf),
        CacheEvents(-1, True, b"", b""),
        Tokens((TokenRun(S, 0, -1, (), None, None),)),
        Tokens((TokenRun(S, 0, 0, (-1,), None, None),)),
        Tokens((TokenRun(S, 0, 0, (2**32,), None, None),)),
    ],
)
def test_a_router_takes_no_number_that_no_node_means(frame: Frame) -> None:
    with pytest.raises(Undecodable):
        decode_from_node(encoded(frame))


@pytest.mark.parametrize(
    "changed", [{"lease_s": math.nan}, {"lease_s": 0.0}, {"block_ids": (-1,)}, {"block_ids": (2**31,)}, {"first_token_index": -4}]
)
def test_a_node_takes_no_grant_that_no_node_gives(changed: dict[str, Any]) -> None:
    decode_from_router(encoded(PushPrefix(S, 0, GRANT)))
    with pytest.raises(Undecodable):
        decode_from_router(encoded(PushPrefix(S, 0, msgspec.structs.replace(GRANT, **changed))))


UNBOUNDED = {"version", "sampling", "logprob", "logprobs", "place", "kv"}
"""Sampling is checked by `read_sequence`, logprobs by `nonsense_in`, a place by `Pool.can_be`; versions and geometries are compared."""


@pytest.mark.parametrize("kind", get_args(ToNode) + get_args(ToRouter), ids=lambda kind: kind.__name__)
def test_every_number_of_a_frame_has_bounds(kind: type[Frame]) -> None:
    assert list(unbounded(kind)) == []


def unbounded(kind: type[msgspec.Struct]) -> Iterator[str]:
    """Fields that hold a plain int or float, in `kind` or in what that holds."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if name not in UNBOUNDED:
            yield from (f"{kind.__name__}.{name}" for _ in plain_numbers(hint))


def plain_numbers(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated or hint is Ellipsis:
        return
    hint = getattr(hint, "__supertype__", hint)
    if hint in (int, float):
        yield hint
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield from unbounded(hint)
    for inside in () if get_origin(hint) is Literal else get_args(hint):
        yield from plain_numbers(inside)


def test_the_bounds_keep_nothing_else_out() -> None:
    frame = JobEnded(S, 2**53, True, "", 2**53, -1.5, 1e15)
    assert decode_from_node(encoded(frame)) == frame
    assert decode_from_router(encoded(Abort(S, 0))) == Abort(S, 0)


def test_a_node_without_blocks_is_none() -> None:
    good = hello(P0, "first")
    assert good.kv == KV
    decoder = msgspec.msgpack.Decoder(type(good))
    assert decoder.decode(encoded(good)) == good
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(encoded(msgspec.structs.replace(good, num_blocks=0)))
