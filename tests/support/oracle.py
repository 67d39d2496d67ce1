"""The oracle: one engine in the test's own process, and prompts to ask it for."""

from functools import cached_property
from itertools import count

from disaggd.engine.build import build_engine
from disaggd.engine.engine import Engine, generate
from disaggd.gateway.tokenizer import Tokenizer, read_tokenizer
from disaggd.model.directory import open_directory
from disaggd.sampling import SamplingParams

SOURCE = '''"""Read records from a file."""
import os
import sys


class Reader:
    """Iterate over the records of an open file."""

    def __init__(self, file, size=1024):
        self.file = file
        self.size = size

    def read(self):
        data = self.file.read(self.size)
        if not data:
            raise EOFError("end of file")
        return data


def main(args=None):
    for name in args or sys.argv[1:]:
        with open(os.path.join(".", name)) as file:
            print(Reader(file).read())
'''


_salts = count(1000)


def prompt_of(num_tokens: int, oracle: "Oracle", salt: int | None = None) -> list[int]:
    """A prompt of exactly `num_tokens` tokens that looks like Python; another `salt` gives another one, and none gives a new one."""
    salt = next(_salts) if salt is None else salt
    tokens = oracle.tokenizer.encode(f"# {salt}\n" + SOURCE * (num_tokens // 100 + 1), add_special_tokens=False)
    assert len(tokens) >= num_tokens
    return tokens[:num_tokens]


class Oracle:
    """One engine in this process, one sequence at a time."""

    def __init__(self, device: str = "cpu") -> None:
        loaded = build_engine(
            "builtin:tiny",
            dtype="float32",
            device=device,
            kv_cache_bytes=2**27,
            block_size=64,
            max_step_tokens=4096,
            max_sequences=1,
        )
        self.engine: Engine = loaded.engine
        self.spec = loaded.spec
        self.kv_spec = loaded.kv_spec
        self.kv = loaded.rank.kv

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(open_directory("builtin:tiny").root, self.spec.vocab_size)

    def continue_(self, prompt: list[int], sampling: SamplingParams) -> list[int]:
        """The output tokens."""
        return [token for output in generate(self.engine, prompt, sampling) for token in output.tokens]

    def top(self, tokens: list[int]) -> list[float]:
        """The two highest log-probabilities of what follows `tokens`."""
        (output,) = generate(self.engine, tokens, SamplingParams(temperature=0.0, max_tokens=1, top_logprobs=2))
        assert output.logprobs is not None
        return [logprob for _, logprob in output.logprobs[0].top]

    def labels(self, tokens: list[int]) -> list[str]:
        """Tokens as the completions endpoint's `logprobs.tokens` spells them."""
        return [_label(self.tokenizer.token_bytes(token)) for token in tokens]

    def kv_bytes(self, num_tokens: int) -> int:
        """What the blocks of a prompt of `num_tokens` weigh."""
        return self.kv_spec.blocks_for(num_tokens) * self.kv_spec.bytes_per_block


def _label(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
