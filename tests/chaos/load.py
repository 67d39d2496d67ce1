"""The clients: each asks one thing, reads the answer as its manner is, and writes down what it saw. Runs on the driver's loop."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from tests.chaos.catalogue import Case
from tests.chaos.ledger import End, Outcome
from tests.chaos.schedule import Ask

SILENCE_S = 150.0
"""A client that has heard nothing for so long gives up: the cluster should have ended the request by itself before."""
LEAVES_S = 0.1
"""A client that leaves before a whole reply waits so long for each of the events that it would have read of a stream."""
DAWDLE_S = 1.5
"""So long a client that dawdles reads nothing."""
MAX_OPEN = 40
"""More are not sent: they wait for others to end."""

_CODES: dict[object, End] = {"no_decode_node": "no_decode_node", "unavailable": "unavailable"}


class Load:
    """Sends requests as a schedule has them until it is told to rest, and keeps every outcome."""

    def __init__(self, url: str, cases: list[Case], asks: Iterator[Ask]) -> None:
        self._url = url
        self._cases = cases
        self._asks = asks
        self._client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
        self._open: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._outcomes: list[Outcome] = []
        """In the order of their ends."""

    @property
    def num_waiting(self) -> int:
        """Outcomes that nobody has taken."""
        return len(self._outcomes)

    def take_outcomes(self) -> list[Outcome]:
        """Of all requests that ended since they were taken last."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def case_of(self, ask: Ask) -> Case:
        return self._cases[ask.case % len(self._cases)]

    @contextlib.asynccontextmanager
    async def offered(self) -> AsyncIterator[None]:
        """Requests keep coming during the body; all of them are over afterwards."""
        sending = asyncio.create_task(self._send())
        try:
            yield
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await asyncio.gather(*self._open)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def saturate(self, clients: int, seconds: float) -> float:
        """Requests per second that `clients` are answered together, each of which asks anew as soon as it is."""
        until_s = time.monotonic() + seconds

        async def ask_on() -> None:
            while time.monotonic() < until_s:
                await self.one(next(self._asks))

        before = len(self._outcomes)
        began_s = time.monotonic()
        await asyncio.gather(*(ask_on() for _ in range(clients)))
        return (len(self._outcomes) - before) / (time.monotonic() - began_s)

    async def one(self, ask: Ask) -> Outcome:
        """A request out of turn."""
        outcome = Outcome(ask=ask, began_s=time.monotonic())
        await self._follow(outcome)
        return outcome

    async def _send(self) -> None:
        for ask in self._asks:
            await asyncio.sleep(ask.wait_s)
            await self._room.acquire()
            task = asyncio.create_task(self._follow(Outcome(ask=ask, began_s=time.monotonic())))
            self._open.add(task)
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._room.release()

    async def _follow(self, outcome: Outcome) -> None:
        """Every way in which a request can end is written down."""
        leaves = outcome.ask.manner == "leave" and not outcome.ask.stream  # it hears nothing before the end: it goes by the clock
        try:
            async with asyncio.timeout(LEAVES_S * outcome.ask.after if leaves else SILENCE_S):
                await self._ask(outcome)
        except TimeoutError:
            outcome.end = "left" if leaves else "silence"
        except httpx.ConnectError as error:
            outcome.end, outcome.note = "refused", str(error)
        except httpx.TransportError as error:
            outcome.end, outcome.note = "broken", f"{type(error).__name__}: {error}"
        except (ValueError, LookupError) as error:
            outcome.end, outcome.note = "error", f"an answer that makes no sense: {error!r}"
        outcome.ended_s = time.monotonic()
        self._outcomes.append(outcome)

    async def _ask(self, outcome: Outcome) -> None:
        ask, case = outcome.ask, self.case_of(outcome.ask)
        body: dict[str, Any] = {"model": "tiny", "prompt": case.prompt, "cache_salt": ask.salt, "stream": ask.stream, **case.options}
        if ask.logprobs:
            body["logprobs"] = 0
        headers = {} if ask.route is None else {"x-disaggd-policy": ask.route}
        async with self._client.stream("POST", self._url + "/v1/completions", json=body, headers=headers) as reply:
            outcome.request_id = reply.headers.get("x-request-id", "")
            if reply.status_code != 200:
                _refusal(outcome, reply.status_code, await reply.aread())
            elif ask.stream:
                await _read_stream(outcome, reply)
            else:
                _hear(outcome, json.loads(await reply.aread())["choices"][0])
                outcome.end = "complete"


async def _read_stream(outcome: Outcome, reply: httpx.Response) -> None:
    """To `[DONE]`, an error event, or where its client leaves."""
    outcome.end, outcome.note = "error", "the stream ended without [DONE]"
    async for line in reply.aiter_lines():
        if not line:
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            outcome.end, outcome.note = (
                ("complete", "") if outcome.finish_reason is not None else ("error", "[DONE] before a finish reason")
            )
            return
        event = json.loads(data)
        if "error" in event:
            _error(outcome, event["error"])
            return
        _hear(outcome, event["choices"][0])
        if len(outcome.event_s) > outcome.ask.after and outcome.ask.manner != "read":
            if outcome.ask.manner == "leave":
                outcome.end, outcome.note = "left", ""
                return
            if len(outcome.event_s) == outcome.ask.after + 1:
                await asyncio.sleep(DAWDLE_S)


def _hear(outcome: Outcome, choice: dict[str, Any]) -> None:
    """What one event, or a whole reply, says."""
    outcome.event_s.append(time.monotonic())
    outcome.text += choice["text"]
    outcome.finish_reason = choice["finish_reason"]
    if (logged := choice["logprobs"]) is not None:
        outcome.labels = [*(outcome.labels or []), *logged["tokens"]]
        outcome.logprobs = [*(outcome.logprobs or []), *logged["token_logprobs"]]


def _refusal(outcome: Outcome, status: int, raw: bytes) -> None:
    try:
        _error(outcome, json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        outcome.end, outcome.note = "error", f"{status}: {raw[:200]!r}"


def _error(outcome: Outcome, error: dict[str, Any]) -> None:
    outcome.end, outcome.note = _CODES.get(error["code"], "error"), str(error["message"])
