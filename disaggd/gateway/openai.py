"""OpenAI's request bodies → what the gateway does with them. Pure functions; knows nothing of HTTP, tokens or nodes.

Every field that OpenAI documents is supported, or accepted while it asks for nothing we lack, or refused by name; a field
that nobody documents is refused with the nearest known one. Fields of vLLM's that clients commonly send count as known.
"""

from typing import Any

import msgspec

from disaggd.errors import ModelNotFound
from disaggd.gateway.fields import Fields, is_number, shown
from disaggd.gateway.limits import GatewayLimits
from disaggd.sampling import MAX_TOP_LOGPROBS, SamplingParams

Prompt = str | list[int]

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default; a chat may fill the context."""

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 128
MAX_MESSAGES = 4096
MAX_SALT_CHARS = 128
MAX_PRIORITY = 100

_OURS = {
    *("model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "logprobs", "cache_salt", "priority"),
}
_IGNORED = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""For OpenAI's own books: they change nothing about the answer."""

_FIXED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
}
"""Known, and accepted with these values only (or null)."""

_COMPLETION_FIXED = _FIXED | {"best_of": (1,), "echo": (False,), "suffix": ("",)}

_CHAT_FIXED = _FIXED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "moderation": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
}

_COMPLETION_KNOWN = _OURS | _IGNORED | _COMPLETION_FIXED.keys() | {"prompt", "add_special_tokens"}
_CHAT_KNOWN = _OURS | _IGNORED | _CHAT_FIXED.keys() | {"messages", "top_logprobs", "chat_template_kwargs"}

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""`developer` is OpenAI's newer name for the system's role, which the templates of open models do not know."""

_MESSAGE_TEXTS = ("name", "reasoning_content")
_MESSAGE_FIXED: dict[str, tuple[object, ...]] = {"tool_calls": ([],), "function_call": (), "refusal": (), "audio": (), "annotations": ([],)}
_MESSAGE_KNOWN = {"role", "content", *_MESSAGE_TEXTS, *_MESSAGE_FIXED}


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request share."""

    sampling: SamplingParams
    """`max_tokens` and an unset seed are settled later, for each prompt."""
    max_tokens: int | None
    """What the client asked for."""
    default_max_tokens: int | None
    """When it asked for nothing, and there is room; None: the rest of the context."""
    seeded: bool
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    cache_salt: str
    """Cached prefixes are shared only between requests of the same salt; empty: between all that have none."""
    priority: int
    """Smaller goes first, as in vLLM."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A body of `/v1/completions`; each prompt becomes one choice."""

    options: Options
    prompts: list[Prompt]
    add_special_tokens: bool


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """A body of `/v1/chat/completions`."""

    options: Options
    messages: list[dict[str, str]]
    template_variables: dict[str, Any]


def read_completion(body: dict[str, Any], model: str, vocab_size: int, limits: GatewayLimits) -> Completion:
    """Raises InvalidRequest naming the field, or ModelNotFound."""
    fields = Fields(body)
    _check(fields, _COMPLETION_KNOWN, _COMPLETION_FIXED, model)
    top_logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    return Completion(
        options=_options(fields, top_logprobs, vocab_size, COMPLETION_MAX_TOKENS),
        prompts=_prompts(fields, vocab_size, limits.max_prompts),
        add_special_tokens=fields.boolean("add_special_tokens", True),
    )


def read_chat(body: dict[str, Any], model: str, vocab_size: int) -> Chat:
    """Raises InvalidRequest naming the field, or ModelNotFound."""
    fields = Fields(body)
    _check(fields, _CHAT_KNOWN, _CHAT_FIXED, model)
    return Chat(
        options=_options(fields, _chat_top_logprobs(fields), vocab_size, None),
        messages=_messages(fields),
        template_variables=_template_variables(fields),
    )


def _check(fields: Fields, known: set[str], fixed: dict[str, tuple[object, ...]], model: str) -> None:
    fields.only(known)
    name = fields.text("model", model)
    if name != model:
        raise ModelNotFound(name, model)
    for field, allowed in fixed.items():
        fields.fixed(field, *allowed)


def _options(fields: Fields, top_logprobs: int | None, vocab_size: int, default_max_tokens: int | None) -> Options:
    stream = fields.boolean("stream", False)
    return Options(
        sampling=_sampling(fields, top_logprobs, vocab_size),
        max_tokens=_max_tokens(fields),
        default_max_tokens=default_max_tokens,
        seeded=fields.get("seed") is not None,
        stop=_stop_strings(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        cache_salt=_cache_salt(fields),
        priority=fields.integer("priority", 0, -MAX_PRIORITY, MAX_PRIORITY),
    )


def _sampling(fields: Fields, top_logprobs: int | None, vocab_size: int) -> SamplingParams:
    return SamplingParams(
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),
        top_p=_positive(fields, "top_p", 1),
        min_p=fields.number("min_p", 0.0, 0, 1),
        seed=fields.integer("seed", 0, -(2**63), 2**64 - 1) % 2**64,
        stop_token_ids=_token_ids(fields, "stop_token_ids", fields.array("stop_token_ids", MAX_STOP_TOKENS, "token ids"), vocab_size),
        ignore_eos=fields.boolean("ignore_eos", False),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        repetition_penalty=_positive(fields, "repetition_penalty", 100),
        logit_bias=_logit_bias(fields, vocab_size),
        top_logprobs=top_logprobs,
    )


def _positive(fields: Fields, name: str, high: float) -> float:
    """A number of which 1 changes nothing and 0 makes no sense."""
    value = fields.number(name, 1.0, 0, high)
    if value == 0:
        raise fields.refusal(name, f"must be more than 0 and at most {high:g}, not 0")
    return value


def _max_tokens(fields: Fields) -> int | None:
    """OpenAI has renamed the field once; whichever is given counts."""
    old = fields.integer("max_tokens", None, 1, 2**31 - 1)
    new = fields.integer("max_completion_tokens", None, 1, 2**31 - 1)
    if old is not None and new is not None and old != new:
        raise fields.refusal("max_tokens", f"is {old}, but max_completion_tokens is {new}: give one of them")
    return old if new is None else new


def _cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt", "")
    if len(salt) > MAX_SALT_CHARS:
        raise fields.refusal("cache_salt", f"must have at most {MAX_SALT_CHARS} characters, not {len(salt)}")
    return salt


def _stop_strings(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if type(stops) is not list or len(stops) > MAX_STOP_STRINGS:
        raise fields.refusal("stop", f"must be a string or a list of at most {MAX_STOP_STRINGS} strings")
    if not all(type(stop) is str and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise fields.refusal("stop", f"each stop must be a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _include_usage(fields: Fields, stream: bool) -> bool:
    if fields.get("stream_options") is None:
        return False
    if not stream:
        raise fields.refusal("stream_options", "only goes with stream=true")
    options = fields.section("stream_options")
    options.only({"include_usage", "include_obfuscation", "continuous_usage_stats"})
    options.fixed("include_obfuscation", False)
    options.fixed("continuous_usage_stats", False)
    return options.boolean("include_usage", False)


def _logit_bias(fields: Fields, vocab_size: int) -> dict[int, float]:
    biases = fields.section("logit_bias").plain()
    for token, bias in biases.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
            raise fields.refusal("logit_bias", f"{shown(token)} is no token id below {vocab_size}")
        if not is_number(bias) or not -100 <= bias <= 100:
            raise fields.refusal("logit_bias", f"the bias of token {token} must be a number from -100 to 100")
    return {int(token): float(bias) for token, bias in biases.items()}


def _token_ids(fields: Fields, name: str, ids: list[Any], vocab_size: int) -> tuple[int, ...]:
    """Quick for prompts of a million ids: three passes in C."""
    if not ids:
        return ()
    if set(map(type, ids)) != {int}:
        raise fields.refusal(name, "token ids must be integers")
    if min(ids) < 0 or max(ids) >= vocab_size:
        outside = min(ids) if min(ids) < 0 else max(ids)
        raise fields.refusal(name, f"token id {shown(outside)} is outside the vocabulary of {vocab_size}")
    return tuple(ids)


def _chat_top_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise fields.refusal("top_logprobs", "only goes with logprobs=true")
    return (top or 0) if wanted else None


def _prompts(fields: Fields, vocab_size: int, max_prompts: int) -> list[Prompt]:
    """Text, texts, token ids or lists of token ids; nothing mixed, nothing empty."""
    value = fields.get("prompt")
    prompts = value if isinstance(value, list) and value and type(value[0]) is not int else [value]
    if len(prompts) > max_prompts:
        raise fields.refusal("prompt", f"has {len(prompts)} prompts, but at most {max_prompts} are allowed")
    if set(map(type, prompts)) not in ({str}, {list}):
        raise fields.refusal("prompt", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids")
    if not all(prompts):
        raise fields.refusal("prompt", "must not be empty")
    for prompt in prompts:
        if type(prompt) is list:
            _token_ids(fields, "prompt", prompt, vocab_size)
    return prompts


def _messages(fields: Fields) -> list[dict[str, str]]:
    messages = fields.array("messages", MAX_MESSAGES, "messages")
    if not messages:
        raise fields.refusal("messages", "must be a list of at least one message")
    return [_message(fields.nested(f"messages[{i}]", message)) for i, message in enumerate(messages)]


def _message(fields: Fields) -> dict[str, str]:
    fields.only(_MESSAGE_KNOWN)
    for name, allowed in _MESSAGE_FIXED.items():
        fields.fixed(name, *allowed)
    role = fields.text("role", None)
    if role not in _ROLES:
        raise fields.refusal("role", f"must be one of {', '.join(_ROLES)} (tools are not supported), not {shown(role)}")
    texts = {name: text for name in _MESSAGE_TEXTS if (text := fields.text(name, None)) is not None}
    return {"role": _ROLES[role], "content": _content(fields), **texts}


def _content(fields: Fields) -> str:
    """A string, or text parts, which are joined by newlines."""
    content = fields.get("content")
    if isinstance(content, str):
        return content
    if type(content) is not list or not content:
        raise fields.refusal("content", "must be a string or a list of text parts")
    return "\n".join(_text_part(fields.nested(f"content[{i}]", part)) for i, part in enumerate(content))


def _text_part(fields: Fields) -> str:
    if fields.get("type") != "text":
        raise fields.refusal("type", f"must be 'text', not {shown(fields.get('type'))}")
    fields.only({"type", "text"})
    text = fields.text("text", None)
    if text is None:
        raise fields.refusal("text", "is missing")
    return text


def _template_variables(fields: Fields) -> dict[str, Any]:
    """What the template may be told besides the messages, such as Qwen3's `enable_thinking`."""
    variables = fields.section("chat_template_kwargs")
    for name in variables.plain():
        if name in ("messages", "tools", "documents", "add_generation_prompt"):
            raise variables.refusal(name, "is set by the server")
    return variables.plain()
