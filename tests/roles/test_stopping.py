"""Signals to one node, really sent; and when its role has nothing left to stop for."""

import asyncio
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disaggd.cluster.protocol import Abort
from disaggd.config import Config
from disaggd.errors import ResourceError
from disaggd.roles import node as process
from disaggd.roles.stopping import StopSignals
from disaggd.transfer import thread
from tests.support.decode_scripts import S, generate, granted, landed, make_decode_node
from tests.support.prefill_scripts import grant_for, handles_done, prefill, push_ended, ready_node
from tests.support.role_nodes import prompt

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("numbers", "exit_code"),
    [([TERM], 0), ([INT], 130), ([TERM, TERM], 0), ([TERM, INT], 130), ([INT, TERM], 130), ([INT, INT], 130)],
)
def test_the_first_signal_drains_and_each_later_one_ends(numbers: list[signal.Signals], exit_code: int) -> None:
    heard: list[str] = []

    async def scenario() -> StopSignals:
        called: asyncio.Queue[str] = asyncio.Queue()
        signals = StopSignals(lambda: called.put_nowait("drain"), lambda: called.put_nowait("end"))
        signals.catch(asyncio.get_running_loop())
        for number in numbers:
            os.kill(os.getpid(), number)
            heard.append(await called.get())
        return signals

    signals = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert heard == ["drain", "end"][: len(numbers)]
    assert signals.exit_code == exit_code
    if exit_code:
        with pytest.raises(KeyboardInterrupt):
            signals.raise_interrupt()
    else:
        signals.raise_interrupt()


def test_systemd_waits_until_a_node_is_drained_and_its_threads_have_ended() -> None:
    unit = (Path(__file__).parents[2] / "deploy" / "systemd" / "disaggd@.service").read_text()
    (timeout_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(timeout_s) >= Config().cluster.drain_s + process.STOP_TIMEOUT_S + thread.STOP_TIMEOUT_S


def test_a_prefill_node_is_idle_when_its_last_push_has_ended() -> None:
    node = ready_node()
    assert node.role.is_idle
    node.say(prefill(prompt(20), grant_for(20)))
    assert not node.role.is_idle
    node.run()
    assert not node.role.is_idle, "computed, and not pushed"
    handles_done(node)
    push_ended(node)
    assert node.role.is_idle


def test_a_node_whose_transfer_thread_hangs_still_ends_its_ranks() -> None:
    ended: list[str] = []

    def hang() -> None:
        raise ResourceError("NIXL hangs in a call")

    node: Any = SimpleNamespace(
        _failure=None,
        _compute=SimpleNamespace(stop=lambda limit_s: True),
        _transfer=SimpleNamespace(stop=hang),
        _loaded=SimpleNamespace(close=lambda: ended.append("ranks")),
    )
    with pytest.raises(ResourceError, match="NIXL hangs"):
        process.EngineNode._stop_threads(node)
    assert ended == ["ranks"]


def test_a_prefill_node_waits_for_the_end_of_a_push_that_it_has_stopped() -> None:
    node = ready_node()
    node.say(prefill(prompt(20), grant_for(20)))
    node.step()
    node.say(Abort(S, 0))
    assert not node.role.is_idle
    handles_done(node)
    push_ended(node, finished=False)
    assert node.role.is_idle


def test_a_decode_node_is_idle_when_its_last_sequence_has_ended_wherever_that_was_prefilled() -> None:
    node = make_decode_node()
    assert node.role.is_idle
    node.say(generate(prompt(5)))
    assert not node.role.is_idle
    node.run()
    assert node.role.is_idle
    grant = granted(node, length=20)
    assert not node.role.is_idle
    landed(node, grant)
    node.run()
    assert node.role.is_idle


def test_what_is_quarantined_keeps_no_decode_node_from_stopping() -> None:
    node = make_decode_node()
    granted(node)
    node.say(Abort(S, 0))
    assert node.role.gauges().blocks_quarantined > 0
    assert node.role.is_idle
