"""A model that several ranks compute together says what one alone says, whatever does not divide by what."""

from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disaggd.errors import ModelError, RankLost, ResourceError
from disaggd.model import parallel
from disaggd.model.directory import open_directory
from disaggd.model.parallel import ProcessRanks, meeting_place, part_of
from disaggd.model.spec import ModelSpec
from disaggd.model.weights import load_weights
from disaggd.transfer.reshape import heads_of
from tests.support.thread_ranks import on_every_rank

TOLERANCE = 1e-4  # float32; as against transformers
CPU = torch.device("cpu")


def spec(kv_heads: int, group: int, neurons: int, words: int) -> ModelSpec:
    return ModelSpec(
        family="llama",
        vocab_size=words,
        hidden_size=64,
        intermediate_size=neurons,
        num_layers=1,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float32",
    )


@given(kv_heads=st.integers(1, 8), group=st.integers(1, 4), neurons=st.integers(9, 700), words=st.integers(9, 999), data=st.data())
def test_the_parts_are_the_whole(kv_heads, group, neurons, words, data):
    whole = spec(kv_heads, group, neurons, words)
    num_ranks = data.draw(st.integers(1, min(9, whole.num_heads)))
    parts = [part_of(whole, rank, num_ranks) for rank in range(num_ranks)]
    for field, total in (("heads", whole.num_heads), ("neurons", neurons), ("vocabulary", words)):
        assert [one for part in parts for one in getattr(part, field)] == list(range(total)), field
    for part in parts:
        assert part.heads, "a rank without a head"
        assert {head // group for head in part.heads} <= set(part.kv_heads)
        assert part.kv_heads == heads_of(part.rank, num_ranks, kv_heads)


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(ModelError, match="tp = 5: the model has 4 heads"):
        part_of(spec(2, 2, 64, 64), 0, 5)


def logits(make_pool, path, rank, num_ranks, ranks, dtype="float32"):
    directory = open_directory(str(path))
    of = directory.spec(dtype)
    pool = make_pool(load_weights(directory, of, CPU, part=part_of(of, rank, num_ranks), ranks=ranks))
    tokens = torch.randint(0, 151, (70,), generator=torch.Generator().manual_seed(7)).tolist()
    steps = [{"a": tokens[:50]}, {"a": tokens[50:51], "b": tokens[:9]}, {"a": tokens[51:52], "b": tokens[9:10]}]
    return torch.cat([pool.step(step, all_rows=True) for step in steps])


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "qwen2-tied", "mistral-window", "qwen3-mha"])
def test_ranks_together_say_what_one_says_alone(name, num_ranks, checkpoint, make_pool):
    path = checkpoint(name).path
    (alone,) = on_every_rank(1, lambda rank, ranks: logits(make_pool, path, rank, 1, None))
    together = on_every_rank(num_ranks, lambda rank, ranks: logits(make_pool, path, rank, num_ranks, ranks))[0]
    assert together.shape == alone.shape
    assert (together - alone).abs().max() <= TOLERANCE


def test_a_rank_holds_its_part_and_no_more(checkpoint):
    directory = open_directory(str(checkpoint("llama").path))
    of = directory.spec("float32")
    whole = load_weights(directory, of, CPU)
    half = load_weights(directory, of, CPU, part=part_of(of, 1, 2))
    assert half.embedding.shape == (151 - 75, 64)
    assert torch.equal(half.embedding, whole.embedding[75:])
    assert half.part == msgspec.structs.replace(half.part, heads=range(2, 4), kv_heads=range(1, 2), neurons=range(64, 128))


@pytest.mark.parametrize("when", ["a group is made", "it is used for the first time"])
def test_that_nccl_cannot_start_is_no_lost_rank(when, monkeypatch):
    def fail(*_):
        raise RuntimeError("unhandled system error")

    first_use = SimpleNamespace(broadcast=fail)
    monkeypatch.setattr(parallel, "_group_on", fail if when == "a group is made" else lambda *_: first_use)
    monkeypatch.setattr(parallel.torch, "zeros", lambda *_, device: None)
    with pytest.raises(ResourceError, match="device cuda:1: NCCL cannot start: unhandled system error") as raised:
        ProcessRanks(1, 2, meeting_place(), 1.0, torch.device("cuda:1"))
    assert not isinstance(raised.value, RankLost)


def test_a_rank_that_does_not_come_is_lost():
    with pytest.raises(RankLost, match="another rank has not come"):
        ProcessRanks(0, 2, meeting_place(), 0.5, CPU)


def test_a_meeting_place_that_nobody_has_opened_is_not_waited_for_and_named(monkeypatch):
    monkeypatch.setattr(parallel, "REACH_TIMEOUT_S", 0.2)
    with pytest.raises(ResourceError, match=r"the place where the ranks meet cannot be reached at 127\.0\.0\.1:1: .*timed out"):
        meeting_place(1)
