"""`disaggd generate`: one engine in this process, one prompt, no cluster. What a cluster's output must equal.

Runs on the main thread. Knows no router, no link and no transfer.
"""

import sys
from contextlib import closing

import msgspec

from disaggd.config import Config, NodeConfig
from disaggd.engine.build import LoadedEngine, load_engine
from disaggd.engine.engine import Engine
from disaggd.engine.sequence import Sequence
from disaggd.errors import InvalidRequest
from disaggd.gateway.tokenizer import Tokenizer, read_tokenizer
from disaggd.ids import SeqId
from disaggd.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 64
"""Where --max-tokens is not given."""


class Generated(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    model: str
    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str | None


def run(config: Config, node: NodeConfig, prompt: str, sampling: SamplingParams, max_tokens: int | None, as_json: bool) -> None:
    """Prints the continuation of `prompt`, as it comes or as one JSON object; nothing of it before all is known to fit.

    `max_tokens` None: `DEFAULT_MAX_TOKENS`, or what the context has room for. Raises DisaggdError.
    """
    with closing(load_engine(config, node)) as loaded:
        _generate(loaded, config, prompt, sampling, max_tokens, as_json)


def _generate(loaded: LoadedEngine, config: Config, prompt: str, sampling: SamplingParams, max_tokens: int | None, as_json: bool) -> None:
    tokenizer = read_tokenizer(loaded.directory.root, loaded.spec.vocab_size)
    tokens = _encode(tokenizer, prompt)
    sampling = msgspec.structs.replace(sampling, max_tokens=_settle(loaded.engine, len(tokens), max_tokens))
    sequence = Sequence(SeqId("solo-0"), tokens, sampling, num_prompt_tokens=len(tokens))
    loaded.engine.add(sequence)
    if not as_json:
        print(prompt, end="", flush=True)  # noqa: T201
    text = _continue(loaded.engine, tokenizer, sequence, echo=not as_json)
    if as_json:
        _print_json(config, sequence, text)


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("the prompt is not valid UTF-8", param="prompt") from error
    tokens = tokenizer.encode(prompt, add_special_tokens=True)
    if not tokens:
        raise InvalidRequest("the prompt is empty", param="prompt")
    return tokens


def _settle(engine: Engine, num_prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens to generate. Raises InvalidRequest where the router would; a prompt too long is the engine's to refuse."""
    room = engine.context_limit - num_prompt_tokens
    if max_tokens is None:
        return max(1, min(room, DEFAULT_MAX_TOKENS))
    if 0 < room < max_tokens:
        holder = "model's context" if engine.context_limit == engine.limits.max_model_len else "KV pool"
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and --max-tokens asks for {max_tokens} more, "
            f"but the {holder} holds {engine.context_limit}",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return max_tokens


def _continue(engine: Engine, tokenizer: Tokenizer, sequence: Sequence, echo: bool) -> str:
    detokenizer = tokenizer.detokenizer(sequence.tokens)
    text: list[str] = []

    def emit(piece: str) -> None:
        text.append(piece)
        if echo:
            sys.stdout.write(piece)
            sys.stdout.flush()

    while not sequence.is_finished:
        for output in engine.step():
            shown = output.tokens[:-1] if output.finish_reason == "stop" else output.tokens
            emit(detokenizer.feed(shown))
    emit(detokenizer.flush())
    if echo:
        sys.stdout.write("\n")
    return "".join(text)


def _print_json(config: Config, sequence: Sequence, text: str) -> None:
    outputs = sequence.tokens[sequence.num_prompt_tokens :]
    generated = Generated(config.model.served_name, text, outputs, sequence.num_prompt_tokens, sequence.finish_reason)
    sys.stdout.write(msgspec.json.encode(generated).decode() + "\n")
