"""What several Deltas at once let be shown."""

from disaggd.gateway.backend import Delta
from disaggd.gateway.choice import Choice
from disaggd.gateway.tokenizer import Tokenizer


def test_nothing_is_heard_after_a_stop_string(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.detokenizer([5]), ("STOP",))
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in ("go", " STOP", " on")]
    said = choice.hear([Delta(tuple(ids)) for ids in tokens])
    assert ["".join(one.text for one in said), said[-1].finish_reason, choice.stopped] == ["go ", "stop", True]
    assert choice.num_tokens == len(tokens[0]) + len(tokens[1])
