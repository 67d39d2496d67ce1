"""How long streams stand still when a node is killed or hangs, and until a restarted one is used again: see --help.

    PYTHONPATH=. python bench/recovery.py

Uses what the failure matrix is tested with (`tests/support`), on a cluster with the deadlines that users have.
"""

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import httpx
from machine import LoadMeter, describe_machine
from report import Table, section, show

from disaggd.sampling import SamplingParams
from tests.support.answers import Ask, Stream
from tests.support.clusters import Cluster, running, wait_until
from tests.support.oracle import Oracle, prompt_of

PROMPT_TOKENS = 512
DEADLINE_S = 120.0


class Bench:
    """One cluster: requests that go over p0 and d0, and what befalls these."""

    def __init__(self, cluster: Cluster, http: httpx.Client, oracle: Oracle) -> None:
        self._cluster = cluster
        self._http = http
        self._oracle = oracle
        self._num_streams = 0

    def prefill_lost(self, number: signal.Signals) -> float:
        """Seconds from the loss of the prefill node, which has the job, to the first token."""
        self._cluster.kill("p0", signal.SIGSTOP)
        stream = self._stream(num_tokens=8, policy="remote")
        wait_until("the job is at p0", lambda: self._receipt(stream).get("phase") == "prefilling", DEADLINE_S, every_s=0.001)
        lost_at = time.monotonic()
        self._cluster.kill("p0", number)
        stream.join(DEADLINE_S)
        self._bring_back("p0", number)
        return stream.arrivals[0] - lost_at

    def decode_lost(self, number: signal.Signals) -> float:
        """Seconds for which the stream stands still after the loss of its decode node."""
        stream = self._stream(num_tokens=1500, policy="local")
        wait_until("it decodes", lambda: stream.num_tokens >= 20, DEADLINE_S, every_s=0.001)
        name = str(self._receipt(stream)["decode_node"])
        lost_at = time.monotonic()
        self._cluster.kill(name, number)
        stream.join(DEADLINE_S)
        self._bring_back(name, number)
        assert self._receipt(stream)["decode_node"] != name, "it had ended before"
        after = [at for at in stream.arrivals if at > lost_at]
        return max(then - before for before, then in zip([lost_at, *after], after, strict=False))

    def used_again(self, name: str) -> float:
        """Seconds from a restarted node's being ready to the first request that it served."""
        self._cluster.kill(name)
        log = self._cluster.log(name)
        num_starts = log.read_text().count("node ready")
        self._cluster.start_node(name)
        wait_until(f"{name} is ready", lambda: log.read_text().count("node ready") > num_starts, DEADLINE_S, every_s=0.002)
        ready_at = time.monotonic()
        wait_until(f"{name} serves a request", lambda: name in self._served_by(), DEADLINE_S)
        took_s = time.monotonic() - ready_at
        wait_until("the cluster is whole", self._cluster.is_whole, DEADLINE_S)
        return took_s

    def _served_by(self) -> tuple[object, object]:
        stream = self._stream(num_tokens=2, policy="remote")
        stream.join(DEADLINE_S)
        receipt = self._receipt(stream)
        return receipt["prefill_node"], receipt["decode_node"]

    def _bring_back(self, name: str, number: signal.Signals) -> None:
        if number is signal.SIGKILL:
            self._cluster.start_node(name)
        else:
            self._cluster.kill(name, signal.SIGCONT)
        wait_until("the cluster is whole", self._cluster.is_whole, DEADLINE_S)
        self._cluster.wait_idle(DEADLINE_S)

    def _stream(self, *, num_tokens: int, policy: str) -> Stream:
        self._num_streams += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        ask = Ask(prompt_of(PROMPT_TOKENS, self._oracle), sampling)
        return Stream(self._http, f"stream-{self._num_streams}", ask, "", policy)

    def _receipt(self, stream: Stream) -> dict[str, object]:
        reply = self._http.get(f"/v1/requests/{stream.id}")
        return dict(reply.json()) if reply.status_code == 200 else {}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Of each row.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Append the section to this file.")
def main(rounds: int, markdown: Path | None) -> None:
    """Kill and stop nodes of a 1P2D cluster of the built-in model: prompts of 512 tokens, heartbeats of 1 s of which 3 may be missed."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(running(Cluster(directory, decode=2)))
        bench = Bench(cluster, stack.enter_context(httpx.Client(base_url=cluster.url, timeout=DEADLINE_S)), Oracle())
        meter = LoadMeter()
        rows: dict[str, Callable[[], float]] = {
            "prefill killed: first token after": lambda: bench.prefill_lost(signal.SIGKILL),
            "prefill hangs: first token after": lambda: bench.prefill_lost(signal.SIGSTOP),
            "decode killed: stream goes on after": lambda: bench.decode_lost(signal.SIGKILL),
            "decode hangs: stream goes on after": lambda: bench.decode_lost(signal.SIGSTOP),
            "prefill restarted: used again, from ready": lambda: bench.used_again("p0"),
            "decode restarted: used again, from ready": lambda: bench.used_again("d0"),
        }
        table = Table("Recovery", ("seconds", "n", "median", "max"), tuple(_row(title, run, rounds) for title, run in rows.items()))
        load = meter.read()
    show(section("Recovery", describe_machine(), load, [table]), markdown)


def _row(title: str, run: Callable[[], float], rounds: int) -> tuple[str, ...]:
    took_s = [run() for _ in range(rounds)]
    return title, str(rounds), f"{median(took_s):.2f}", f"{max(took_s):.2f}"


if __name__ == "__main__":
    main()
