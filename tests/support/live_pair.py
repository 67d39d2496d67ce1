"""A router's dispatcher and both roles in this process, over scripted time; KV between two real processes, over real NIXL.

What a role asks of its transfer thread goes to its `kv_node` process, and what that says comes back. Nobody computes: `fill` writes what
would have been computed into a whole pool.
"""

import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from disaggd.cluster.dispatcher import Dispatcher
from disaggd.cluster.moves import DispatchRules
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import ToNode
from disaggd.cluster.request import Request
from disaggd.ids import Incarnation, SeqId
from disaggd.roles.compute import LinkId
from disaggd.roles.decode_role import DecodeRole
from disaggd.roles.prefill_role import PrefillRole
from disaggd.sampling import SamplingParams
from disaggd.transfer.messages import TransferEvent
from tests.support.decode_scripts import generate, make_decode_node
from tests.support.prefill_scripts import make_prefill_node
from tests.support.role_nodes import LAYER_GROUPS, LINK, RoleNode, prompt
from tests.support.routing import D0, P0, Client, hello

NUM_BLOCKS = 20
NUM_LAYERS = LAYER_GROUPS[-1].stop
BLOCK_BYTES = 1 << 19
"""Of one layer: a prompt of 15 blocks is 23 MB, more than the sockets between two processes take."""
LENGTH = 60
"""Tokens of the prompts: 15 of the blocks, and one more for what is generated."""
NUM_STEPS = 4
"""That such a prompt takes."""
LEASE_S = 60.0
"""Longer than a test takes: the transfer threads count it in real time."""
DEADLINE_S = 20.0


@dataclass
class Live:
    """One node, and what is on its way to it."""

    role: RoleNode[PrefillRole] | RoleNode[DecodeRole]
    process: Any
    frames: deque[ToNode] = field(default_factory=deque)
    is_stopped: bool = False
    is_linked: bool = True
    events: list[TransferEvent] = field(default_factory=list)
    """All that its transfer thread said."""

    def stop(self) -> None:
        self.is_stopped = True
        self.process.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.is_stopped = False
        self.process.signal(signal.SIGCONT)

    def fill(self, seed: int) -> None:
        self.process.call("fill", seed)


class LivePair:
    """`start` starts a `kv_node` process."""

    def __init__(self, start: Callable[..., Any]) -> None:
        self.now = 1000.0
        rules = DispatchRules(prefix_push="never", request_timeout_s=1e6)
        self.dispatcher = Dispatcher(Incarnation("r"), rules, lambda: self.now, lambda record: None)
        size = {"layers": NUM_LAYERS, "num_blocks": NUM_BLOCKS, "block_bytes": BLOCK_BYTES}
        self.prefill = Live(make_prefill_node(NUM_BLOCKS), start(**size))
        decode = make_decode_node(NUM_BLOCKS, bytes_per_block=NUM_LAYERS * BLOCK_BYTES, lease_s=LEASE_S)
        self.decode = Live(decode, start(**size))
        self.nodes = {P0: self.prefill, D0: self.decode}
        kv = self.prefill.process.kv
        self.dispatcher.prefill_up(PrefillPeer(P0, replace(hello(P0, "first"), kv=kv), self.prefill.frames.append))
        self.dispatcher.decode_up(DecodePeer(D0, replace(hello(D0, "first"), kv=kv), self.decode.frames.append))
        self.prefill.role.link_up(LINK)  # its credit was said before anybody listened
        self._has_new_owner = False
        self.wait_until(lambda: self.dispatcher.pairs.is_ready(P0, D0))

    # ── what may happen ──

    def submit(self) -> SeqId:
        """A prompt that is prefilled elsewhere."""
        sampling = SamplingParams(max_tokens=4, ignore_eos=True)
        return self.dispatcher.submit(Request(id="one", prompt=tuple(prompt(LENGTH)), sampling=sampling, override="remote"), Client())

    def after(self, seconds: float) -> None:
        self.now += seconds
        for node in self.nodes.values():
            if not node.is_stopped:
                node.role.after(self.now - node.role.now)
        self.dispatcher.tick()
        self.pump()

    def step(self, node: Live) -> None:
        node.role.step()
        self.pump()

    def lose_router(self) -> None:
        """It dies: no frame of it is delivered any more."""
        for node in self.nodes.values():
            node.is_linked = False
            node.frames.clear()
            node.role.link_down()

    def wait_until(self, condition: Callable[[], object], each_s: float = 0.0) -> None:
        """Have things happen until the condition holds, and so many seconds of scripted time pass between two of them."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, {name: node.events for name, node in self.nodes.items()}
            self.after(each_s)
            self.pump(0.02)

    def pump(self, within_s: float = 0.0) -> None:
        """Carry everything that nodes which run have said to where it goes."""
        for node in self.nodes.values():
            self._carry(node, within_s)

    def _carry(self, node: Live, within_s: float) -> None:
        if node.is_stopped:
            return
        while node.frames:
            node.role.say(node.frames.popleft())
        commands, frames = list(node.role.commands), list(node.role.sent)
        node.role.clear()
        if commands:
            node.process.submit(*commands)
        name = P0 if node is self.prefill else D0
        for link, frame in frames:
            if node.is_linked and link == LINK:
                self.dispatcher.on_frame(name, frame)
        while (event := node.process.find(TransferEvent, within_s)) is not None:
            node.events.append(event)
            node.role.event(event)

    # ── what the tests begin with ──

    def push_that_nobody_reads(self) -> SeqId:
        """Most of a prompt is computed, and being written to decode, which is stopped: part of it is in the sockets, the rest is not."""
        self.prefill.fill(1)
        self.decode.fill(2)
        seq = self.submit()
        self.wait_until(lambda: self.prefill.role.engine.has_work)
        self.decode.stop()
        for _ in range(NUM_STEPS - 1):
            self.step(self.prefill)
        assert self.prefill.process.find(TransferEvent, 0.2) is None, "no write ends before it is read"
        return seq

    def next_owner_asks(self) -> None:
        """Another router's prompt, which wants most of decode's pool."""
        link = LinkId(2)
        self.decode.role.link_up(link)
        self.decode.role.say(generate(prompt(LENGTH, seed=7), SeqId("next"), policy="local"), link=link)

    def next_owner_has_begun(self, filling: int) -> bool:
        """Whether it has its blocks. Its KV is there at once then, and it minds what is in the others, too."""
        if self.decode.role.engine.has_work:
            self.step(self.decode)
        if not self._has_new_owner and self.decode.role.running_blocks:
            self._has_new_owner = True
            self.decode.fill(filling)
        return self._has_new_owner
