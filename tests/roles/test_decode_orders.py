"""The decode role under messages in any order: no block is lost or shared, and when all is quiet nothing is left.

The machine plays the routers, the transfer thread and the prefill nodes, each of which keeps its side of the protocol
but no more: pushes land or fail late, quiesces come clean or not or never, links and prefill nodes come and go.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from disaggd.cluster.hello import OpenPair
from disaggd.cluster.protocol import Abort, Cancel, Generate, Grant, Granted, NeedPrefill, PrefillLost, Progress, Quiesced, RequestGrant
from disaggd.ids import AgentId, GrantToken, Incarnation, NodeName, SeqId
from disaggd.roles.compute import LinkId
from disaggd.transfer import messages as transfer
from disaggd.transfer.notification import FirstToken
from tests.support.decode_scripts import AGENT, P0, PLACE, Staging, generate, is_empty, make_decode_node
from tests.support.endpoints import endpoint
from tests.support.role_nodes import LEASE_S, QUIESCE_S, prompt

NAMES = st.sampled_from([SeqId(name) for name in "abcd"])


class DecodeOrders(RuleBasedStateMachine):
    staging_blocks: int | None = None

    @initialize()
    def start(self) -> None:
        self.staging = None if self.staging_blocks is None else Staging(self.staging_blocks)
        self.node = make_decode_node(24, self.staging)
        self.link = LinkId(1)
        self.num_links = 1
        self.attempts: dict[SeqId, int] = {}
        self.agent = AGENT
        self.num_agents = 1
        self.incarnation = 1
        self.expected: dict[GrantToken, AgentId] = {}
        """What the transfer thread expects to land."""
        self.forgotten: dict[GrantToken, None] = {}
        """What it was told to forget; an event may have been under way."""
        self.writable: dict[GrantToken, Grant] = {}
        """Grants whose prefill node has not said that it is done."""

    # ── what the role says is taken in after every rule ──

    def settle(self) -> None:
        for command in self.node.commands:
            match command:
                case transfer.Expect(token, _, agent_id):
                    assert agent_id == self.agent, "a grant at an agent that is gone"
                    self.expected[token] = agent_id
                case transfer.Forget(token):
                    if self.expected.pop(token, None) is not None:
                        self.forgotten[token] = None
        fences = self.node.submitted(transfer.Fence)
        for _, frame in self.node.sent:
            if isinstance(frame, Granted | NeedPrefill) and frame.grant is not None:
                self.writable[frame.grant.token] = frame.grant
        self.node.clear()
        for fence in fences:
            assert fence.agent_id == self.agent, "fenced once"
            self.renew_agent()
        self.check_blocks()

    def renew_agent(self) -> None:
        old, self.num_agents = self.agent, self.num_agents + 1
        self.agent = AgentId(f"agent-{self.num_agents}")
        self.expected = {token: agent for token, agent in self.expected.items() if agent != old}
        self.writable = {token: grant for token, grant in self.writable.items() if grant.agent_id != old}
        incarnation = Incarnation(f"p0-{self.incarnation}")
        self.node.event(transfer.Fenced(P0, old), transfer.PairOpened(P0, incarnation, endpoint(self.agent, b"", PLACE)))
        self.settle()

    def check_blocks(self) -> None:
        """Nobody computes in blocks that a prefill node may still write."""
        used = {block for sequence in self.node.engine.sequences.values() for block in sequence.block_table}
        landing = self.node.role._granting._landings._landing
        for grant in self.writable.values():
            assert self.staging is not None or not used & set(grant.block_ids)
            assert all(landing.references(block) for block in grant.block_ids)
        for landed, blocks in self.staging.under_way if self.staging is not None else ():
            assert not used & set(blocks), "nobody computes where a copy writes"
            assert all(self.node.pool.references(block) for block in blocks)
            assert all(landing.references(block) for block in landed), "nor is a peer given what it reads"

    # ── the router ──

    @rule(seq=NAMES, length=st.integers(1, 60), rides=st.booleans())
    def place(self, seq: SeqId, length: int, rides: bool) -> None:
        attempt = self.attempts.get(seq, -1) + 1
        self.attempts[seq] = attempt
        frame: Generate = generate(prompt(length), seq, attempt=attempt, max_tokens=6, grant_for=P0 if rides else None)
        self.node.say(frame, link=self.link)
        self.settle()

    @rule(seq=NAMES, earmark=st.booleans())
    def ask_for_a_grant(self, seq: SeqId, earmark: bool) -> None:
        placed = self.node.role._placed.get(seq)
        if placed is not None and placed.sequence.state.value == "queued":
            if placed.grant is not None and placed.grant in self.writable:
                del self.writable[placed.grant]  # the router asks again only for what it forwarded to nobody
            self.node.say(RequestGrant(seq, placed.attempt, P0, earmark), link=self.link)
            self.settle()

    @rule(seq=NAMES, older=st.integers(0, 1))
    def abort(self, seq: SeqId, older: int) -> None:
        self.node.say(Abort(seq, self.attempts.get(seq, 0) - older), link=self.link)
        self.settle()

    @rule(seq=NAMES)
    def lose_its_prefill(self, seq: SeqId) -> None:
        self.node.say(PrefillLost(seq, self.attempts.get(seq, 0)), link=self.link)
        self.settle()

    @rule()
    def lose_the_router(self) -> None:
        self.node.link_down(self.link)
        self.num_links += 1
        self.link = LinkId(self.num_links)
        self.node.link_up(self.link)
        self.settle()

    @rule()
    def restart_the_prefill_node(self) -> None:
        self.incarnation += 1
        self.node.say(OpenPair(P0, Incarnation(f"p0-{self.incarnation}"), 1), link=self.link)
        self.settle()
        self.renew_agent()

    # ── the prefill node and the transfer thread ──

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), fails=st.booleans())
    def land(self, data: st.DataObject, fails: bool) -> None:
        token = data.draw(st.sampled_from(list(self.writable)))
        if self.expected.pop(token, None) is None:
            return  # forgotten: the notifications are dropped
        if fails:
            self.node.event(transfer.LandingFailed(token, "twice"))
        else:
            del self.writable[token]
            self.node.event(transfer.Landed(token, FirstToken(5), 0))
        self.settle()

    @precondition(lambda self: self.forgotten)
    @rule(data=st.data(), fails=st.booleans())
    def land_too_late(self, data: st.DataObject, fails: bool) -> None:
        """The event was under way when its grant was freed."""
        token = data.draw(st.sampled_from(list(self.forgotten)))
        del self.forgotten[token]
        self.node.event(transfer.LandingFailed(token, "twice") if fails else transfer.Landed(token, FirstToken(5), 0))
        self.settle()

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def make_progress(self, data: st.DataObject) -> None:
        self.node.say(Progress((data.draw(st.sampled_from(list(self.writable))),)), link=self.link)
        self.settle()

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), clean=st.booleans(), wire=st.booleans())
    def quiesce(self, data: st.DataObject, clean: bool, wire: bool) -> None:
        token = data.draw(st.sampled_from(list(self.writable)))
        record = self.node.role._grants.get(token)
        if not wire and (record is None or record.state.value != "quarantined"):
            return  # only an answer to a `Cancel` comes through a router
        if clean:
            del self.writable[token]
        self.node.event(transfer.QuiescedByWire(token, clean, P0)) if wire else self.node.say(Quiesced(token, NodeName("d0"), clean))
        self.settle()

    @precondition(lambda self: self.staging is not None)
    @rule()
    def copy(self) -> None:
        self.staging.finish()
        self.node.after(0.0)
        self.settle()

    # ── time and computing ──

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_S, QUIESCE_S]))
    def time_passes(self, seconds: float) -> None:
        self.node.after(seconds)
        self.settle()

    @rule()
    def step(self) -> None:
        self.node.step()
        self.settle()

    def teardown(self) -> None:
        """All clients leave and nobody says anything any more: leases, waits and fences bring every block back."""
        if not hasattr(self, "node"):
            return
        for seq, attempt in self.attempts.items():
            self.node.say(Abort(seq, attempt), link=self.link)
        self.settle()
        if self.staging is not None:
            self.staging.finish()
        for _ in range(2):
            self.node.after(LEASE_S + QUIESCE_S)
            self.settle()
        assert is_empty(self.node)
        assert not self.node.engine._scheduler.earmarks
        assert not self.node.frames(Cancel)


class StagedDecodeOrders(DecodeOrders):
    """Grants land in staging memory that holds two of the longer prompts."""

    staging_blocks = 30


DecodeOrders.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
StagedDecodeOrders.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestDecodeOrders = DecodeOrders.TestCase
TestStagedDecodeOrders = StagedDecodeOrders.TestCase
