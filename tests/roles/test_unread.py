"""Tokens that wait for clients: as many as they may leave, each and all together; who leaves more is given up, and only he."""

import asyncio

import pytest

from disaggd.errors import TooSlow
from disaggd.roles.unread import DeltaQueue, Unread, UnreadLimits
from disaggd.sampling import TokenLogprob

LIKELIEST = TokenLogprob(-0.1, tuple((token, -0.1) for token in range(9)))


class Streams:
    """Queues that share a bound, and the names of those that were given up."""

    def __init__(self, stream: int = 10, together: int = 100) -> None:
        self.unread = Unread(UnreadLimits(stream, together))
        self.aborted: list[str] = []

    def open(self, name: str) -> DeltaQueue:
        return DeltaQueue(self.unread, lambda why: self.aborted.append(name))


def test_a_stream_may_leave_as_much_as_its_bound_and_finds_it_later() -> None:
    async def scenario() -> None:
        streams = Streams(stream=10)
        queue = streams.open("a")
        for token in range(10):
            queue.deliver((token,), None, None)
        assert [delta.tokens for delta in await queue.take()] == [(token,) for token in range(10)]
        assert (streams.unread.num_tokens, streams.aborted) == (0, [])

    asyncio.run(scenario())


def test_one_token_more_ends_it_and_drops_what_waits() -> None:
    async def scenario() -> None:
        streams = Streams(stream=10)
        slow, other = streams.open("slow"), streams.open("other")
        other.deliver((1,), None, None)
        for token in range(11):
            slow.deliver((token,), None, None)
        assert streams.aborted == [], "not while the dispatcher is in the middle of a frame"
        slow.deliver((99,), None, "length")
        await asyncio.sleep(0)
        assert (streams.aborted, streams.unread.num_tokens) == (["slow"], 1)
        for _ in range(2):
            with pytest.raises(TooSlow, match="11 tokens wait"):
                await slow.take()
        assert [delta.tokens for delta in await other.take()] == [(1,)]

    asyncio.run(scenario())


def test_a_stream_that_is_waited_for_has_no_bound() -> None:
    """What comes in one turn of the loop is taken in the next, however much it is."""

    async def scenario() -> None:
        streams = Streams(stream=10)
        queue = streams.open("a")
        taking = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        for token in range(50):
            queue.deliver((token,), None, None)
        assert len(await taking) == 50
        for token in range(11):
            queue.deliver((token,), None, None)
        await asyncio.sleep(0)
        assert streams.aborted == ["a"], "from then on nobody waits"

    asyncio.run(scenario())


def test_logprobs_count() -> None:
    async def scenario() -> None:
        streams = Streams(stream=10)
        queue = streams.open("a")
        queue.deliver((1,), (LIKELIEST,), None)
        assert streams.unread.num_tokens == 10
        queue.deliver((1,), (LIKELIEST,), None)
        await asyncio.sleep(0)
        assert streams.aborted == ["a"]

    asyncio.run(scenario())


def test_when_all_leave_too_much_together_those_who_leave_most_go() -> None:
    async def scenario() -> None:
        streams = Streams(stream=10, together=20)
        queues = {name: streams.open(name) for name in "abc"}
        for name, count in (("a", 5), ("b", 8), ("c", 7)):
            queues[name].deliver(tuple(range(count)), None, None)
        await asyncio.sleep(0)
        assert streams.aborted == []
        queues["a"].deliver((1,), None, None)
        await asyncio.sleep(0)
        assert (streams.aborted, streams.unread.num_tokens) == (["b"], 13)
        assert len(await queues["a"].take()) == 2

    asyncio.run(scenario())


def test_a_client_that_goes_leaves_nothing() -> None:
    async def scenario() -> None:
        streams = Streams()
        queue = streams.open("a")
        queue.deliver((1, 2, 3), None, None)
        queue.close()
        queue.close()
        assert streams.unread.num_tokens == 0

    asyncio.run(scenario())
