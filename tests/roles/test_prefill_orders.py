"""The prefill role under messages in any order: every job is reported once, every cancel answered, every block given back.

The machine plays the router and the transfer thread, whose handles end in any order, fail, or take for ever.
"""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from disaggd.cluster.hello import PairReady
from disaggd.cluster.protocol import Abort, Cancel, JobEnded, Quiesced
from disaggd.ids import BlockId, GrantToken, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from tests.support.prefill_scripts import AGENT, D0, P0, connect, grant_for, is_idle, prefill, ready_node
from tests.support.role_nodes import QUIESCE_S, kv_of, prompt


@dataclass
class FakePush:
    """What the transfer thread knows of one grant."""

    seq: SeqId
    attempt: int
    num_blocks: int
    handles: list[tuple[BlockId, ...]] = field(default_factory=list)
    written: Counter[tuple[int, BlockId]] = field(default_factory=Counter)
    """How often each layer of each target block was written."""
    is_drained: bool = False
    is_finished: bool = False
    is_clean: bool = True

    @property
    def has_ended(self) -> bool:
        return (self.is_drained or self.is_finished) and not self.handles


class PrefillOrders(RuleBasedStateMachine):
    @initialize(target_size=st.sampled_from([4, 4, 8, 6, 2]))
    def start(self, target_size: int) -> None:
        self.target_size = target_size
        self.node = ready_node(num_blocks=24, target_size=target_size)
        self.link = LinkId(1)
        self.num_links = 1
        self.num_jobs = 0
        self.pushes: dict[GrantToken, FakePush] = {}
        self.tokens: list[GrantToken] = []
        self.open_jobs: set[tuple[SeqId, int]] = set()
        """Reports that the router waits for."""
        self.open_cancels: Counter[GrantToken] = Counter()

    # ── what the role says is taken in after every rule ──

    def settle(self) -> None:
        while self.node.commands or self.node.sent:
            commands, frames = list(self.node.commands), list(self.node.sent)
            self.node.clear()
            for command in commands:
                self.obey(command)
            for link, frame in frames:
                if link == self.link and isinstance(frame, JobEnded):
                    self.open_jobs.remove((frame.seq, frame.attempt))
                if link == self.link and isinstance(frame, Quiesced):
                    assert frame.token not in self.pushes, "something is in flight"
                    self.open_cancels[frame.token] -= 1
        self.check_blocks()

    def obey(self, command: transfer.TransferCommand) -> None:
        match command:
            case transfer.BeginPush(token):
                job = self.node.role._pushed[token]
                self.pushes[token] = FakePush(*job.key, -(-len(job.sequence.tokens) // self.target_size))
            case transfer.PushBlocks(token, layers, source, target):
                push = self.pushes.get(token)
                if push is None or push.is_drained:
                    return self.node.event(transfer.HandleDone(token, source.blocks, 0))
                push.handles.append(source.blocks)
                push.written.update((layer, block) for layer in layers for block in target)
            case transfer.FinishPush(token):
                push = self.pushes.get(token)
                if push is not None and not push.is_drained:
                    assert len(push.written) == 3 * push.num_blocks and set(push.written.values()) == {1}, "exactly once"
                    push.is_finished = True
                    self.end_if_over(token)
            case transfer.CancelPush(token):
                if (push := self.pushes.get(token)) is not None:
                    push.is_drained = True
                    self.end_if_over(token)
            case transfer.ClosePair():
                self.lose_every_handle()
        return None

    def end_if_over(self, token: GrantToken) -> None:
        if self.pushes[token].has_ended:
            push = self.pushes.pop(token)
            self.node.event(transfer.PushEnded(token, push.is_clean, push.is_finished, 0, None, None))

    def lose_every_handle(self) -> None:
        for token, push in list(self.pushes.items()):
            push.is_clean = push.is_clean and not push.handles
            push.is_drained = True
            while push.handles:
                self.node.event(transfer.HandleDone(token, push.handles.pop(), 0))
            self.end_if_over(token)

    def check_blocks(self) -> None:
        """No block that a handle reads belongs to another sequence."""
        for push in self.pushes.values():
            reading = {block for source in push.handles for block in source}
            for sequence in self.node.engine.sequences.values():
                if (sequence.seq_id, sequence.attempt) != (push.seq, push.attempt):
                    assert not reading & set(sequence.block_table)

    # ── the router ──

    @rule(length=st.integers(1, 60), has_grant=st.booleans(), reuse=st.booleans())
    def send_job(self, length: int, has_grant: bool, reuse: bool) -> None:
        self.num_jobs += 1
        seq, token = SeqId(f"s{self.num_jobs}"), GrantToken(b"%d" % self.num_jobs)
        if reuse and self.tokens:
            token = self.tokens[-1]  # one that is cancelled, pushed or over: to be refused
        self.tokens.append(token)
        self.open_jobs.add((seq, 0))
        grant = grant_for(length, token, block_size=self.target_size) if has_grant else None
        self.node.say(prefill(prompt(length), grant, seq), link=self.link)
        self.settle()

    @precondition(lambda self: self.num_jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = SeqId(f"s{data.draw(st.integers(1, self.num_jobs))}")
        self.node.say(Abort(seq, 0), link=self.link)
        self.settle()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from([*self.tokens[-4:], GrantToken(b"%d" % (self.num_jobs + 1))]))
        self.open_cancels[token] += 1
        self.node.say(Cancel(token, P0, D0), link=self.link)
        self.settle()

    @rule()
    def lose_the_router(self) -> None:
        self.node.link_down(self.link)
        self.num_links += 1
        self.link = LinkId(self.num_links)
        self.open_jobs.clear()
        self.open_cancels.clear()
        self.node.link_up(self.link)
        self.settle()

    @rule()
    def pair_anew(self) -> None:
        connect(self.node, AGENT, self.link, kv_of(self.target_size))
        self.node.say(PairReady(D0, AGENT), link=self.link)
        self.settle()

    # ── the transfer thread ──

    @precondition(lambda self: any(push.handles for push in self.pushes.values()))
    @rule(data=st.data(), fails=st.integers(0, 4))
    def end_a_handle(self, data: st.DataObject, fails: int) -> None:
        token = data.draw(st.sampled_from(sorted(token for token, push in self.pushes.items() if push.handles)))
        push = self.pushes[token]
        source = push.handles.pop(data.draw(st.integers(0, len(push.handles) - 1)))
        if fails == 0:
            push.is_clean, push.is_drained = False, True
        self.node.event(transfer.HandleDone(token, source, 0))
        self.end_if_over(token)
        self.settle()

    @rule()
    def lose_the_pair(self) -> None:
        self.lose_every_handle()
        self.node.event(transfer.PairFailed(D0, AGENT, "connection reset"))
        self.settle()

    # ── time and computing ──

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, QUIESCE_S]))
    def time_passes(self, seconds: float) -> None:
        self.node.after(seconds)
        self.settle()

    @rule()
    def step(self) -> None:
        self.node.step()
        self.settle()

    def teardown(self) -> None:
        """Everything is computed and every handle ends: nothing is left, and nobody waits for an answer."""
        if not hasattr(self, "node"):
            return
        while self.node.engine.has_work or self.pushes:
            self.node.step()
            self.settle()
            for token, push in list(self.pushes.items()):
                while push.handles:
                    self.node.event(transfer.HandleDone(token, push.handles.pop(), 0))
                self.end_if_over(token)
            self.settle()
        assert is_idle(self.node)
        assert not self.open_jobs
        assert not +self.open_cancels and not -self.open_cancels
        assert self.node.role.next_deadline() is None


PrefillOrders.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPrefillOrders = PrefillOrders.TestCase
