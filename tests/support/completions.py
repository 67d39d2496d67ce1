"""Many completions at once, and their comparison with the oracle."""

import asyncio
import threading
from typing import Any

import httpx

from disaggd.sampling import SamplingParams
from tests.support.clusters import Cluster
from tests.support.oracle import Oracle

TIE = 1e-4
"""Two logits this close may change places with the order of a float32 sum: a tie, and the only excuse."""


Work = list[tuple[list[int], dict[str, Any]]]
"""Prompts and their options."""


async def complete_all(cluster: Cluster, work: Work, policy: str | None = None) -> list[dict[str, Any]]:
    """The replies; `policy`, if there is one, overrides the decision of all of them."""
    headers = {} if policy is None else {"x-disaggd-policy": policy}
    async with httpx.AsyncClient(timeout=240, limits=httpx.Limits(max_connections=len(work))) as client:

        async def one(prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
            body = {"model": "tiny", "prompt": prompt, "logprobs": 0, **options}
            reply = await client.post(cluster.url + "/v1/completions", json=body, headers=headers)
            assert reply.status_code == 200, reply.text
            return dict(reply.json())

        return await asyncio.gather(*(one(prompt, options) for prompt, options in work))


class InBackground:
    """Requests under way while the test breaks something. Leaves no thread behind: `replies` joins it."""

    def __init__(self, cluster: Cluster, work: Work, policy: str | None = None) -> None:
        self._work = work
        self._replies: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._run, args=(cluster, policy))
        self._thread.start()

    def _run(self, cluster: Cluster, policy: str | None) -> None:
        self._replies = asyncio.run(complete_all(cluster, self._work, policy))

    def replies(self) -> list[dict[str, Any]]:
        self._thread.join(240)
        assert len(self._replies) == len(self._work), "a request was lost"
        return self._replies


def check(reply: dict[str, Any], prompt: list[int], options: dict[str, Any], oracle: Oracle) -> None:
    """Equal, or different from a tie on; anything else fails, with the oracle's gap."""
    expected = oracle.continue_(prompt, SamplingParams(**options))
    labels = oracle.labels(expected)
    got = reply["choices"][0]["logprobs"]["tokens"]
    if got == labels:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, labels, strict=True)) if a != b)
    top = list(oracle.top(prompt + expected[:at]))
    gap = top[0] - top[1]
    message = (
        f"{len(prompt)} prompt tokens, {options}: token {at} is {got[at]!r}, the oracle's {labels[at]!r}; its two best are {gap:.2e} apart"
    )
    print(message)
    assert options["temperature"] == 0.0 and gap <= TIE, message
