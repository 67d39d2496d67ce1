"""HTTP requests that make no sense, or nearly do: every route; headers and bodies that are good, slightly changed, or no such thing."""

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz.wild import json_values, texts

KEY = "sk-disaggd-" + "a" * 43
"""An administrator's, where keys are asked for."""

Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Case:
    """One request. `target` is the path and query as they are sent."""

    method: str
    target: bytes
    headers: tuple[Header, ...]
    body: bytes

    def __repr__(self) -> str:
        return f"Case({self.method}, {self.target!r:.200}, {self.headers!r:.500}, {self.body!r:.1000})"


PATHS = (
    b"/v1/completions",
    b"/v1/chat/completions",
    b"/v1/models",
    b"/v1/models/tiny",
    b"/v1/requests",
    b"/v1/cluster",
    b"/v1/cluster/trace",
    b"/v1/debug/blocks",
    b"/health",
    b"/ready",
    b"/metrics",
    b"/",
    b"//",
    b"/v1/completions/",
    b"/v1/models/",
    b"/docs",
)
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")

_visible = st.binary(min_size=1, max_size=30).map(lambda raw: bytes(33 + byte % 94 for byte in raw))
_segments = _visible | st.sampled_from((b"%00", b"%ff%fe", b"..%2f..", b"%", b"%zz", b"a" * 300, b"%F0%9F%98%80", b"q1:2", b"[", b"%0d%0a"))
_parameters = st.sampled_from((b"1", b"0", b"-1", b"5", b"1e3", b"999999999999", b"", b"NaN", b"%00", b"%d9%a1", b"0x10", b"1&limit=2"))
targets = st.one_of(
    st.sampled_from(PATHS),
    st.builds(lambda base, tail: base + tail, st.sampled_from((b"/v1/requests/", b"/v1/models/", b"/")), _segments),
    st.builds(lambda value: b"/v1/requests?limit=" + value, _parameters),
    st.builds(lambda value: b"/v1/cluster/trace?seconds=" + value, _parameters),
    st.builds(lambda path, query: path + b"?" + query, st.sampled_from(PATHS), _segments),
)

_values = st.binary(max_size=40).map(lambda raw: raw.translate(None, b"\r\n\x00"))
_known_headers = st.one_of(
    st.tuples(st.just(b"x-request-id"), _values | st.sampled_from((b"mine", b"a" * 200, b"\xff", b"a b", b"../x"))),
    st.tuples(st.just(b"x-session-id"), _values),
    st.tuples(st.just(b"x-disaggd-policy"), st.sampled_from((b"local", b"remote", b"both", b"", b"\xe9"))),
    st.tuples(
        st.just(b"authorization"),
        st.sampled_from((b"Bearer", b"Bearer ", b"Basic eDp5", b"Bearer \xff\xfe", b"Bearer " + b"b" * 54)) | _values,
    ),
    st.tuples(st.just(b"host"), st.sampled_from((b"", b"[", b"[::1", b"a:b:c", b"x/y", b"\xff", b"router:99999999")) | _values),
    st.tuples(st.just(b"content-type"), st.sampled_from((b"text/plain", b"multipart/form-data", b"application/json; charset=utf-16"))),
    st.tuples(st.just(b"accept-encoding"), _values),
    st.tuples(st.just(b"expect"), st.just(b"100-continue")),
)
headers = st.lists(
    _known_headers | st.tuples(_visible.map(lambda raw: b"x-" + raw.translate(None, b':()<>@,;\\"/[]?={} ')), _values), max_size=4
)
good_key = (b"authorization", b"Bearer " + KEY.encode())

_FIELDS: dict[str, SearchStrategy[Any]] = {
    "prompt": st.sampled_from(
        ("hello", ["a", "b"], [1, 2, 3], [[1], [2, 3]], [], [[]], [1, "a"], [4096], [-1], ["a"] * 65, [[1]] * 65, "x" * 9000)
    ),
    "messages": st.lists(
        st.fixed_dictionaries(
            {}, optional={"role": st.sampled_from(("user", "system", "tool", 1)), "content": json_values, "name": json_values}
        ),
        max_size=3,
    ),
    "model": st.sampled_from(("tiny", "other", "")),
    "stream": st.sampled_from((True, False, 1, "yes")),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.sampled_from((True, None, 1)), "other": json_values}),
    "max_tokens": st.sampled_from((1, 3, 0, -1, 255, 256, 2**31, 2**70, 1.0, True)),
    "max_completion_tokens": st.sampled_from((1, 3, 0, 2**31)),
    "stop": st.sampled_from(("a", ["a", "b"], "", [""], ["a"] * 17, "a" * 1025, ["\x00"], [None], {"a": 1}, "\ud800")),
    "stop_token_ids": st.sampled_from(([1], [-1], [4096], [1.5], ["1"], [2**70], [True])),
    "temperature": st.sampled_from((0, 1, 2, 2.0001, -1, 1e308, float("nan"), float("inf"), "1", True)),
    "top_p": st.sampled_from((0, 1, 1e-320, 1.1, float("nan"))),
    "top_k": st.sampled_from((0, -1, -2, 2**31, 1.5)),
    "min_p": st.sampled_from((0, 1, -0.0, 2)),
    "seed": st.sampled_from((0, -(2**63), 2**64 - 1, 2**64, -(2**63) - 1, 10**500, 1.5)),
    "presence_penalty": st.sampled_from((2, -2, 3, float("-inf"))),
    "repetition_penalty": st.sampled_from((1, 0, 1e-320, 101)),
    "logit_bias": st.dictionaries(
        st.sampled_from(("1", "01", "-1", "4096", "１", "", "1e1", "9" * 5000)),
        st.sampled_from((0, 100, -100, 101, 1e400, None, True)),
        max_size=3,
    ),
    "logprobs": st.sampled_from((True, False, 0, 5, 20, 21, -1)),
    "top_logprobs": st.sampled_from((0, 20, 21, True)),
    "n": st.sampled_from((1, 0, 2, True, 1.0)),
    "best_of": st.sampled_from((1, 2)),
    "priority": st.sampled_from((0, 100, -101, 1.5, "high")),
    "cache_salt": st.sampled_from(("", "s", "s" * 129, "\ud800", 1)),
    "chat_template_kwargs": st.dictionaries(
        st.sampled_from(("enable_thinking", "bos_token", "raise_exception", "loop", "self", "range")) | texts, json_values, max_size=2
    ),
    "response_format": st.sampled_from(({"type": "text"}, {"type": "json_object"}, [])),
    "tools": st.sampled_from(([], [{}], None)),
}
_NAMES = st.sampled_from(sorted(_FIELDS))


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    """A good body with up to three fields changed, added or taken away."""
    body: dict[str, Any] = draw(
        st.sampled_from(({"prompt": "hello", "max_tokens": 3}, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}))
    )
    body = dict(body)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(_NAMES)
        kind = draw(st.integers(0, 5))
        if kind == 0:
            body.pop(name, None)
        elif kind == 1:
            body[name] = draw(json_values)
        elif kind == 2:
            body[draw(st.text(max_size=8))] = draw(json_values)
        else:
            body[name] = draw(_FIELDS[name])
    return body


def _dumped(value: object) -> bytes:
    """With NaN and Infinity spelt out, and lone surrogates escaped."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """JSON with bytes changed, cut off or said twice."""
    raw = _dumped(draw(objects()))
    at = draw(st.integers(0, len(raw)))
    match draw(st.integers(0, 3)):
        case 0:
            return raw[:at]
        case 1:
            return raw[:at] + draw(st.binary(max_size=4)) + raw[at + 1 :]
        case 2:
            return raw[:-1] + b"," + raw[1:]
        case _:
            return raw + raw[at:]


_MONSTERS = st.sampled_from(
    (
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
        b'{"prompt":' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"prompt":"' + b"a" * 300_000 + b'"}',
        b'{"seed":' + b"9" * 100_000 + b"}",
        b'{"prompt":"a","temperature":1e' + b"9" * 5_000 + b"}",
        b'{"prompt":"\\ud800"}',
        b'{"\\ud800":1}',
        b'{"prompt":"\xed\xa0\x80"}',
        b'\xff\xfe{\x00"\x00',
        b'\xef\xbb\xbf{"prompt":"a"}',
        b'{"prompt":"\xf0\x9f"}',
        b'{"prompt":"a","prompt":[1]}',
    )
)
bodies = st.one_of(objects().map(_dumped), objects().map(_dumped), damaged(), _MONSTERS, st.binary(max_size=60))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two in three are for the routes that read a body."""
    if draw(st.integers(0, 2)):
        method, target = "POST", draw(st.sampled_from(PATHS[:2]))
    else:
        method, target = draw(st.sampled_from(METHODS)), draw(targets)
    others = tuple(draw(headers)) if draw(st.booleans()) else ()
    key = (good_key,) if draw(st.integers(0, 5)) else ()
    return Case(method, target, (*others, *key), draw(bodies))
