"""Blocks that are made for their target in a staging memory: where they lie there, and what happens when it is full."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.errors import ConfigError
from disaggd.ids import BlockId
from disaggd.transfer.layout import KVGroup, KVSpec, Span
from disaggd.transfer.messages import IsReady, at_once
from disaggd.transfer.pool import Region
from disaggd.transfer.repack import Repacked, StagingRoom, check_room
from disaggd.transfer.source import Load

TARGET = KVSpec(dtype="bfloat16", block_size=4, head_dim=1, groups=(KVGroup(layers=3, kv_heads=5, head_bytes=16),))


def span(num_tokens: int, start: int = 0) -> Span:
    return Span(tuple(BlockId(block) for block in range(-(-(start + num_tokens) // 8))), start, num_tokens)


class Notes:
    """A repacker that notes what it was asked for."""

    def __init__(self, num_bytes: int) -> None:
        self.region = Region(1 << 20, num_bytes)
        self.asked: list[tuple[int, KVSpec, range, range, Span]] = []

    def repack(self, offset: int, target: KVSpec, layers: range, heads: range, span: Span) -> IsReady:
        self.asked.append((offset, target, layers, heads, span))
        return at_once


class Bench:
    """Sources of two ranks, of two heads (32 bytes of a block) and of three (48), that share a memory."""

    def __init__(self, num_bytes: int) -> None:
        self.repacker = Notes(num_bytes)
        room = StagingRoom(num_bytes)
        self.two, self.three = (Repacked(self.repacker, room, heads, TARGET) for heads in (range(1, 3), range(0, 3)))


def loaded(source: Repacked, layers: range, num_tokens: int, start: int = 0) -> Load:
    load = source.load(layers, span(num_tokens, start))
    assert load is not None
    return load


def test_what_is_written_lies_side_by_side_as_the_target_has_it() -> None:
    bench = Bench(1000)
    load = loaded(bench.two, range(1, 3), 9, start=3)
    assert load.is_ready() and load.indices.tolist() == [0, 1, 2, 3, 4, 5]  # three blocks in each of two layers
    assert bench.repacker.asked == [(0, TARGET, range(1, 3), range(1, 3), span(9, 3))]
    registered = bench.two.registered
    assert (registered.region, registered.offset, registered.length, registered.stride) == (bench.repacker.region, 0, 32, 32)
    assert registered.count == 31


def test_descriptors_of_another_size_do_not_touch_what_is_taken() -> None:
    bench = Bench(1000)
    loaded(bench.two, range(1), 4)
    assert loaded(bench.three, range(1), 8).indices.tolist() == [1, 2]  # from 48 on: 32 is no multiple of it
    assert [offset for offset, *_ in bench.repacker.asked] == [0, 48]


def test_without_room_nothing_is_made_until_something_is_unloaded() -> None:
    bench = Bench(5 * 32)
    first, second = loaded(bench.two, range(1), 12), loaded(bench.two, range(1), 4)
    assert bench.two.load(range(1), span(8)) is None
    assert len(bench.repacker.asked) == 2
    bench.two.unload(first)
    third = loaded(bench.two, range(1), 8)
    assert not set(third.indices.tolist()) & set(second.indices.tolist())


def test_all_of_the_memory_can_be_had_at_once_and_again() -> None:
    bench = Bench(6 * 32)
    for _ in range(3):
        loads = [loaded(bench.two, range(1), 4) for _ in range(6)]
        for load in loads[::2] + loads[1::2]:
            bench.two.unload(load)
        bench.two.unload(loaded(bench.two, range(3), 8))


def test_more_at_once_than_there_is_altogether_is_a_fault_and_does_not_wait_for_ever() -> None:
    with pytest.raises(AssertionError, match="6 blocks at once, of 5"):
        Bench(5 * 32).two.load(range(3), span(8))


def test_a_memory_that_holds_no_whole_write_is_refused_when_the_pair_is_made() -> None:
    check_room(2 * 3 * 32, range(1, 3), TARGET, 2, 9)
    with pytest.raises(ConfigError, match=r"transfer.staging: 191 bytes are less .* it must have 192"):
        check_room(2 * 3 * 32 - 1, range(1, 3), TARGET, 2, 9)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 17)) | st.none(), max_size=60), st.randoms(use_true_random=False))
def test_room_is_given_once_and_comes_back(wanted: list[tuple[int, int] | None], random: np.random.RandomState) -> None:
    """None: give something back."""
    room, taken, used = StagingRoom(128), [], np.zeros(128, dtype=np.int64)
    for each in wanted:
        if each is not None:
            num_bytes, step = each
            offset = room.take(num_bytes, step)
            if offset is None:
                starts = range(0, 128 - num_bytes + 1, step)
                assert all(used[start : start + num_bytes].any() for start in starts), "there was room"
                continue
            assert offset % step == 0 and offset + num_bytes <= 128
            used[offset : offset + num_bytes] += 1
            assert used.max() == 1
            taken.append((offset, num_bytes))
        elif taken:
            offset, num_bytes = taken.pop(random.randrange(len(taken)))
            used[offset : offset + num_bytes] -= 1
            room.give_back(offset, num_bytes)
    for offset, num_bytes in taken:
        room.give_back(offset, num_bytes)
    assert room.take(128, 1) == 0
