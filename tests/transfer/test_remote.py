"""Both ends of the pipe to another rank's transfer thread, without such a thread."""

import threading
import time
from functools import partial
from multiprocessing import Pipe
from queue import SimpleQueue

import pytest

from disaggd.ids import AgentId, GrantToken, NodeName
from disaggd.pulse import Pulse
from disaggd.transfer import messages as m
from disaggd.transfer.joint import JointTransfers
from disaggd.transfer.remote import PipeInbox, RemoteTransfers, wait_until_stuck
from disaggd.transfer.thread import TransferStats
from tests.support.endpoints import span
from tests.support.scripted_rank import ScriptedRank

TOKEN = GrantToken(bytes(16))
COMMANDS = [
    m.Expect(TOKEN, NodeName("p0"), AgentId("a0"), 3),
    m.PushBlocks(TOKEN, range(2), span(()), ()),
    m.Forget(TOKEN),
]


def test_commands_come_in_as_they_were_said() -> None:
    ours, theirs = Pipe()
    remote, inbox = RemoteTransfers(ours, lambda event: None), PipeInbox(theirs)
    for command in COMMANDS:
        remote.submit(command)
    assert inbox.take(0) == COMMANDS, "what was sent is there at once: no piece of a grant may come before its `Expect`"
    assert inbox.take(0) == []


def test_a_write_that_a_device_has_not_computed_comes_in_when_it_has() -> None:
    """What asks the device stays on this side of the pipe, which it would not go through."""
    ours, theirs = Pipe()
    inbox, is_computed = PipeInbox(theirs), threading.Event()
    joint = JointTransfers(lambda post: ScriptedRank(), [partial(RemoteTransfers, ours)], lambda event: None)  # type: ignore[arg-type,return-value]
    joint.start()
    joint.submit(m.PushBlocks(TOKEN, range(2), span(()), (), lambda: is_computed.is_set()))
    joint.submit(m.FinishPush(TOKEN, None))
    assert inbox.take(0.05) == []
    is_computed.set()
    taken = inbox.take(10)
    while len(taken) < 2:
        taken += inbox.take(10)
    assert taken == [m.PushBlocks(TOKEN, range(2), span(()), ()), m.FinishPush(TOKEN, None)]
    joint.stop()


def test_an_inbox_wakes_up_in_less_than_a_millisecond() -> None:
    _ours, theirs = Pipe()
    inbox = PipeInbox(theirs)
    took_s = []
    for _ in range(20):
        began = time.monotonic()
        assert inbox.take(50e-6) == []
        took_s.append(time.monotonic() - began)
    assert min(took_s) < 1e-3, "while bytes move the thread sleeps for 50 µs"


@pytest.mark.parametrize("how", ["told", "left alone"])
def test_a_thread_is_stopped_by_its_own_process_and_by_the_end_of_the_other(how: str) -> None:
    ours, theirs = Pipe()
    inbox, taken = PipeInbox(theirs), SimpleQueue[list[m.TransferCommand]]()
    thread = threading.Thread(target=lambda: taken.put(inbox.take(None)))
    thread.start()
    if how == "told":
        inbox.put(m.Stop())
    else:
        ours.close()
    assert taken.get(timeout=10) == [m.Stop()]
    thread.join()


def test_what_a_rank_says_is_posted_with_its_counts_until_it_is_gone() -> None:
    ours, theirs = Pipe()
    heard = SimpleQueue[m.TransferEvent]()
    remote = RemoteTransfers(ours, heard.put)
    remote.start()
    stats = TransferStats(1, 2, 3, 4, 5)
    event = m.HandleDone(TOKEN, (), 7)
    theirs.send((event, stats))
    assert heard.get(timeout=10) == event
    assert remote.stats() == stats
    theirs.close()
    remote._thread.join(10)
    assert not remote._thread.is_alive()
    remote.submit(m.Forget(TOKEN))
    remote.stop()


def test_a_thread_is_stuck_when_it_has_not_got_on_for_so_long_and_was_not_at_rest() -> None:
    pulse, looks = Pulse(), 0

    def pause(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks in (1, 3, 5):  # it gets on now and then, up to the fifth look
            pulse.beat()
        if looks == 6:
            pulse.rest()  # waits for commands, for as long as it likes
        if looks == 100:
            pulse.beat()

    wait_until_stuck(pulse, 3.0, pause)
    assert looks == 103
