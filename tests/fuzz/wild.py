"""Nonsense of the right type: numbers, names, JSON values, and whole frames whose fields are partly such as the receiver knows."""

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

ODD_INTEGERS = (0, 1, -1, 2, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
"""Where counters overflow; no more than 64 bits, which is what msgpack has."""
ODD_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, -1e300, float("inf"), float("-inf"), float("nan"), 1e18)
ODD_TEXTS = ("", "\x00", "p0", "d0", "p7", "\n\r", "é", "\U0001f600", "a" * 300, "../../etc/passwd", "%s%n", "\u202e", " ")

integers = st.sampled_from(ODD_INTEGERS) | st.integers(-8, 128)
floats = st.sampled_from(ODD_FLOATS) | st.floats(-10, 1000)
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=8).filter(lambda text: text.isprintable())
blobs = st.sampled_from((b"", b"\x00", bytes(16), b"\xff" * 16, b"\x01\x00\x00\x00", b"\xc1" * 5)) | st.binary(max_size=24)

_PLAIN: dict[Any, SearchStrategy[Any]] = {
    int: integers,
    float: floats,
    bool: st.booleans(),
    str: texts,
    bytes: blobs,
    type(None): st.none(),
}

Live = Mapping[str, SearchStrategy[Any]]
"""By a field's name: values that the receiver knows."""


def struct(kind: type[msgspec.Struct], live: Live) -> SearchStrategy[Any]:
    """Any `kind` whatever: each field is live, three times out of four where it can be, or anything of its type."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {}
    for name in kind.__struct_fields__:
        anything = of_type(hints[name], live)
        known = live.get(name)
        fields[name] = anything if known is None else st.one_of(known, known, known, anything)
    return st.builds(kind, **fields)


def of_type(hint: Any, live: Live) -> SearchStrategy[Any]:
    """Any value of this annotation, its constraints apart."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hasattr(hint, "__supertype__"):
        return of_type(hint.__supertype__, live)
    if origin is Annotated:
        return of_type(args[0], live)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([of_type(arg, live) for arg in args])
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(of_type(args[0], live), max_size=4).map(tuple)
    if origin is tuple:
        return st.tuples(*(of_type(arg, live) for arg in args))
    if origin is dict:
        return st.dictionaries(of_type(args[0], live), of_type(args[1], live), max_size=3)
    assert issubclass(hint, msgspec.Struct), f"no nonsense of type {hint}"
    return struct(hint, live)


def frames(kinds: Any, live: Live) -> SearchStrategy[Any]:
    """Any frame of a union of them."""
    return st.one_of([struct(kind, live) for kind in get_args(kinds)])


json_scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from((*ODD_INTEGERS, 2**64, -(2**200), 10**400))
    | st.integers(-5, 300)
    | st.sampled_from([value for value in ODD_FLOATS if abs(value) < 1e301])
    | texts
    | st.sampled_from(("a" * 5000, "<|endoftext|>", "{{ 7 * 7 }}", "{% raise %}", "\ufffd\u0000", "data: [DONE]\n\n"))
)
json_values = st.recursive(
    json_scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8
)
