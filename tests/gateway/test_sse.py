"""The order of what is sent, whatever the connection's pace."""

import asyncio
from typing import Any

import msgspec

from disaggd.gateway.choice import Said
from disaggd.gateway.replies import CHAT, COMPLETION, Reply
from disaggd.gateway.sse import EventStream
from disaggd.gateway.tokenizer import Tokenizer


def test_no_choice_overtakes_the_status_line(tokenizer: Tokenizer) -> None:
    sent: list[Any] = []

    async def run() -> None:
        resume = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                await resume.wait()
            sent.append(message)

        stream = EventStream(send, Reply(CHAT, tokenizer, "id", "tiny", 0, usage_follows=False), {"x-request-id": "id"})
        async with asyncio.TaskGroup() as group:
            for index in range(3):
                group.create_task(stream.add(index, [Said("x", None, None)]))
            await asyncio.sleep(0)
            assert not stream.started
            resume.set()
        await stream.done(None)

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * 4
    assert [b'"role"' in message["body"] for message in sent[1:]] == [True, True, True, False]
    assert (b"x-request-id", b"id") in sent[0]["headers"]
    assert [message["more_body"] for message in sent[1:]] == [True, True, True, False]


def test_what_came_together_is_sent_together_and_stays_one_event_each(tokenizer: Tokenizer) -> None:
    sent: list[Any] = []

    async def run() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        stream = EventStream(send, Reply(COMPLETION, tokenizer, "id", "tiny", 0, usage_follows=False), {})
        await stream.add(0, [Said("a", None, None), Said("", None, None), Said("b", None, "length")])

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    events = [msgspec.json.decode(event.removeprefix(b"data: ")) for event in sent[1]["body"].split(b"\n\n")[:-1]]
    assert [event["choices"][0]["text"] for event in events] == ["a", "", "b"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
