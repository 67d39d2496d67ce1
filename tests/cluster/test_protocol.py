"""Every frame survives the wire as it is, and nothing else gets through."""

import itertools
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.cluster import protocol
from disaggd.cluster.hello import Frame
from disaggd.cluster.protocol import Generate, Grant, Granted, Tokens, ToNode, ToRouter, pack_tokens, unpack_tokens
from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId

FRAMES = sorted({*typing.get_args(ToNode), *typing.get_args(ToRouter)}, key=lambda kind: kind.__name__)
U32 = st.integers(min_value=0, max_value=2**32 - 1)


@given(st.lists(U32))
def test_token_ids_travel_as_four_bytes_each(tokens: list[int]) -> None:
    raw = pack_tokens(tokens)
    assert len(raw) == 4 * len(tokens)
    assert unpack_tokens(raw) == tokens


def test_token_ids_are_little_endian() -> None:
    assert pack_tokens([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


def test_half_a_token_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack_tokens(b"\x01\x00\x00")


def example(hint: Any, numbers: Iterator[int]) -> Any:
    """A value of the annotated type; no two scalars in it are alike."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, typing.NewType):
        return example(hint.__supertype__, numbers)
    if origin in (types.UnionType, typing.Union):  # `X | None`
        return example(arguments[0], numbers)
    if origin is typing.Literal:
        return arguments[-1]
    if origin is tuple:
        return tuple(example(argument, numbers) for argument in (arguments[:1] * 2 if arguments[-1] is ... else arguments))
    if origin is dict:
        return {example(arguments[0], numbers): example(arguments[1], numbers)}
    if issubclass(hint, msgspec.Struct):
        return hint(**{name: example(field, numbers) for name, field in typing.get_type_hints(hint).items() if name[0] != "_"})
    number = next(numbers)
    scalars = {bool: bool(number % 2), int: number, float: number + 0.5, str: f"text {number}", bytes: bytes([number])}
    return scalars[hint]


@pytest.mark.parametrize("kind", FRAMES, ids=lambda kind: kind.__name__)
def test_every_frame_survives_the_wire(kind: type[Frame]) -> None:
    frame = example(kind, itertools.count(1))
    for wire in (ToNode, ToRouter):
        if kind in typing.get_args(wire):
            assert msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=wire) == frame


def test_every_frame_of_the_module_belongs_to_a_direction() -> None:
    declared = {value for value in vars(protocol).values() if isinstance(value, type) and issubclass(value, Frame) and value is not Frame}
    assert declared == set(FRAMES)


def test_a_nodes_frame_is_not_taken_from_a_router() -> None:
    raw = msgspec.msgpack.encode(Tokens(()))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=ToNode)


def test_a_frame_with_a_wrong_type_inside_is_refused() -> None:
    raw = msgspec.msgpack.encode(["Abort", "seq", "not a number"])
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(raw, type=ToNode)


def test_a_grant_travels_inside_its_frame() -> None:
    grant = Grant(GrantToken(bytes(16)), NodeName("d"), NodeName("p"), AgentId("a"), 0, (BlockId(3), BlockId(9)), 5.0)
    frame = Granted(SeqId("s"), 1, grant)
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=ToRouter)
    assert isinstance(decoded, Granted) and decoded.grant == grant


def test_frames_are_compact() -> None:
    """A tagged array without field names: 1,500 tokens cost little more than their 6,000 bytes."""
    frame = Generate(SeqId("0123456789abcdef-1"), 0, pack_tokens(range(1500)), 1500, protocol.SamplingParams(), "auto", 1, 0, None)
    assert len(msgspec.msgpack.encode(frame)) < 6_100
