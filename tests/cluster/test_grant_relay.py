"""The relay answers for grants that no prefill node was given, and for no other."""

from disaggd.cluster.grant_relay import GrantRelay
from disaggd.cluster.peers import DecodePeer, PrefillPeer
from disaggd.cluster.protocol import Cancel, Grant, Progress, Quiesced, ToNode
from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId
from tests.support.routing import D0, D1, P0, hello


class Relay:
    """A relay between one prefill node and two decode nodes; `sent` by node."""

    def __init__(self) -> None:
        self.sent: dict[NodeName, list[ToNode]] = {P0: [], D0: [], D1: []}
        self.decodes = {name: DecodePeer(name, hello(name, "first"), self.sent[name].append) for name in (D0, D1)}
        self.prefills = {P0: self.prefill()}
        self.relay = GrantRelay(self.prefills, self.decodes)

    def prefill(self, incarnation: str = "first") -> PrefillPeer:
        return PrefillPeer(P0, hello(P0, incarnation), self.sent[P0].append)

    def forward(self, token: bytes, decode: NodeName = D0, seq: str = "s") -> Cancel:
        """Forward a grant; returns the `Cancel` that decode may send for it."""
        grant = Grant(GrantToken(token), decode, P0, AgentId("a"), 0, (BlockId(1),), 5.0)
        self.relay.forwarded((SeqId(seq), 0), grant, self.prefills[P0])
        return Cancel(grant.token, P0, decode)


def test_a_cancel_goes_to_the_prefill_node_that_has_the_grant_and_its_answer_back() -> None:
    relay = Relay()
    cancel = relay.forward(b"t")
    relay.relay.on_cancel(relay.decodes[D0], cancel)
    assert relay.sent == {P0: [cancel], D0: [], D1: []}
    relay.relay.on_quiesced(Quiesced(cancel.token, D0, False))
    assert relay.sent[D0] == [Quiesced(cancel.token, D0, False)]
    assert len(relay.relay) == 0


def test_a_cancel_of_a_grant_that_was_never_forwarded_is_answered_here() -> None:
    relay = Relay()
    relay.relay.on_cancel(relay.decodes[D1], Cancel(GrantToken(b"t"), P0, D1))
    assert relay.sent == {P0: [], D0: [], D1: [Quiesced(GrantToken(b"t"), D1, True)]}


def test_a_cancel_for_a_lost_prefill_node_is_answered_by_nobody() -> None:
    """Its bytes may still be under way: clean would be a lie."""
    relay = Relay()
    cancel = relay.forward(b"t")
    del relay.prefills[P0]
    relay.relay.on_cancel(relay.decodes[D0], cancel)
    assert relay.sent == {P0: [], D0: [], D1: []}
    assert len(relay.relay) == 0


def test_a_cancel_is_not_put_to_the_prefill_nodes_next_start() -> None:
    """It would say clean of a grant it never had, while the bytes of its last life are under way."""
    relay = Relay()
    cancel = relay.forward(b"t")
    relay.prefills[P0] = relay.prefill("second")
    relay.relay.on_cancel(relay.decodes[D0], cancel)
    assert relay.sent == {P0: [], D0: [], D1: []}


def test_renewals_reach_the_decode_nodes_that_gave_the_grants() -> None:
    relay = Relay()
    relay.forward(b"a", D0), relay.forward(b"b", D1), relay.forward(b"c", D0)
    relay.relay.on_progress(Progress((GrantToken(b"a"), GrantToken(b"b"), GrantToken(b"c"), GrantToken(b"unknown"))))
    assert relay.sent[D0] == [Progress((GrantToken(b"a"), GrantToken(b"c")))]
    assert relay.sent[D1] == [Progress((GrantToken(b"b"),))]


def test_a_cancelled_grant_is_renewed_no_more() -> None:
    relay = Relay()
    cancel = relay.forward(b"t")
    relay.relay.on_cancel(relay.decodes[D0], cancel)
    relay.relay.on_progress(Progress((cancel.token,)))
    assert relay.sent[D0] == []


def test_a_grant_is_forgotten_when_it_has_landed_or_its_decode_node_is_lost() -> None:
    relay = Relay()
    relay.forward(b"a", D0, "one"), relay.forward(b"b", D0, "two"), relay.forward(b"c", D1, "three")
    relay.relay.over((SeqId("one"), 0), D0)
    assert len(relay.relay) == 2
    relay.relay.over((SeqId("two"), 1), D0)
    assert len(relay.relay) == 2, "another attempt's"
    relay.relay.target_down(D0)
    assert len(relay.relay) == 1


def test_an_answer_to_a_lost_decode_node_goes_nowhere() -> None:
    relay = Relay()
    del relay.decodes[D0]
    relay.relay.on_quiesced(Quiesced(GrantToken(b"t"), D0, True))
    assert relay.sent == {P0: [], D0: [], D1: []}
