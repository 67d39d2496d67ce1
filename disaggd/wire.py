"""What crosses a wire between nodes: numbers within bounds, and `WireDecoder`, which takes msgpack from whoever sends it.

The bounds are wide: they keep out what no honest peer means (less than nothing, infinity, no number), and what would overflow later,
far from the frame that brought it. A frame that breaks one is undecodable.
"""

from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from disaggd.ids import BlockId

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""Of anything, or an index."""
SmallCount = Annotated[int, Meta(ge=0, lt=2**31)]
"""Of what numpy or NIXL counts in 32 bits."""
WireBlock = Annotated[BlockId, Meta(ge=0, lt=2**31)]
Real = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""A finite number: NaN and the infinities are outside."""
Cost = Annotated[float, Meta(ge=0, le=1e15)]
"""What something takes, or is thought to."""

Message = TypeVar("Message")


class Undecodable(Exception):
    """The bytes are no message of the expected type. Says where they go wrong."""


class WireDecoder(Generic[Message]):
    """Decodes messages of one type, which may be a union of tagged structs."""

    def __init__(self, kind: Any) -> None:
        self._decode: Callable[[bytes], Message] = msgspec.msgpack.Decoder(kind).decode

    def __call__(self, raw: bytes) -> Message:
        """Raises Undecodable."""
        try:
            return self._decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Undecodable(str(error)) from error
