"""Push or compute, as a table; and what the router makes of pushes that landed or failed."""

import msgspec
import pytest

from disaggd.cluster.offer import PrefillCost, TransferCost
from disaggd.cluster.peers import PrefillPeer
from disaggd.cluster.prefix_push import FORGOTTEN, Missing, PrefixPolicy, _bytes_per_token, is_worth_pushing
from disaggd.cluster.protocol import (
    Abort,
    CacheEvents,
    Cancel,
    Measured,
    Prefill,
    PrefixEnded,
    PrefixGrant,
    PrefixOutcome,
    PrefixSource,
    Progress,
    PushPrefix,
    Quiesced,
)
from disaggd.ids import GrantToken, NodeName
from disaggd.prefix import PrefixHasher
from tests.support.routing import D0, D1, KV, P0, Client, Routing, grant_of, hello

# A millisecond a token; a second a gigabyte, a megabyte a token.
COMPUTING = PrefillCost(0.01, 1e-3, 0.0)
WIRE = TransferCost(5e-3, 1e-9)
FAR = TransferCost(5e-3, 1e-6)


@pytest.mark.parametrize(
    ("policy", "num_held", "num_cached", "wait_s", "prefill_cost", "push_cost", "pushes"),
    [
        pytest.param("auto", 512, 0, 0.0, PrefillCost(0.01, 2e-3, 0.0), WIRE, True, id="a fast wire"),
        pytest.param("auto", 512, 0, 0.0, PrefillCost(0.01, 0.5e-3, 0.0), WIRE, False, id="a fast processor"),
        pytest.param("auto", 512, 0, 0.3, PrefillCost(0.01, 0.5e-3, 0.0), WIRE, True, id="it would wait anyway"),
        pytest.param("auto", 4, 0, 0.0, COMPUTING, WIRE, False, id="too little for two hops"),
        pytest.param("auto", 512, 512, 9.0, COMPUTING, WIRE, False, id="nothing is missing"),
        pytest.param("auto", 256, 512, 9.0, COMPUTING, WIRE, False, id="it has more than decode"),
        pytest.param("auto", 0, 0, 9.0, COMPUTING, WIRE, False, id="decode has nothing"),
        pytest.param("auto", 512, 0, 9.0, None, WIRE, False, id="nobody knows"),
        pytest.param("always", 4, 0, 0.0, None, FAR, True, id="always"),
        pytest.param("always", 512, 512, 0.0, COMPUTING, WIRE, False, id="always, if anything is missing"),
        pytest.param("never", 512, 0, 9.0, COMPUTING, WIRE, False, id="never"),
    ],
)
def test_what_is_sooner_done(
    policy: PrefixPolicy,
    num_held: int,
    num_cached: int,
    wait_s: float,
    prefill_cost: PrefillCost | None,
    push_cost: TransferCost,
    pushes: bool,
) -> None:
    missing = Missing(
        num_tokens=1024,
        num_held=num_held,
        num_cached=num_cached,
        bytes_per_token=1e6,
        wait_s=wait_s,
        prefill_cost=prefill_cost,
        push_cost=push_cost,
    )
    assert is_worth_pushing(policy, missing) is pushes


def test_what_attends_to_a_long_context_is_dear_to_compute() -> None:
    """Token for token the rest is computed at the same price; what is saved is what the beginning attends to."""
    cost = PrefillCost(0.0, 0.0, 1e-6)
    missing = Missing(
        num_tokens=2000, num_held=1000, num_cached=0, bytes_per_token=1.0, wait_s=0.0, prefill_cost=cost, push_cost=TransferCost(0.4, 0.0)
    )
    assert missing.saved_s(cost) == pytest.approx(0.5)
    assert is_worth_pushing("auto", missing)


# ── the router ───────────────────────────────────────────────────────────────────────────────────────────────────────

HASHER = PrefixHasher("model", KV.dtype, KV.block_size)
HELD = 24


def routing(policy: PrefixPolicy = "always", decodes: tuple[NodeName, ...] = (D0,)) -> Routing:
    return Routing(decodes=decodes, shares_prefixes=True, prefix_push=policy)


def prefilling(router: Routing, num_held: int = HELD) -> Client:
    """A job whose grant leaves out what decode has cached."""
    client = router.queued()
    router.granted(client, first_token_index=num_held)
    return client


def prefix_grant(client: Client, decode: NodeName = D0) -> PrefixGrant:
    token = GrantToken(f"prefix of {client.seq}/{client.attempt}".encode())
    return PrefixGrant(client.seq, client.attempt, grant_of(token, P0, decode))


def ended(client: Client, outcome: PrefixOutcome = "landed", num_tokens: int = HELD, took_ms: float = 3.0) -> PrefixEnded:
    return PrefixEnded(client.seq, client.attempt, outcome, "" if outcome == "landed" else "why", num_tokens, num_tokens * 100, took_ms)


def test_a_prefix_goes_to_the_prefill_node_that_lacks_it() -> None:
    router = routing()
    client = prefilling(router)
    assert router.last(P0, Prefill).prefix == PrefixSource(D0, HELD)
    frame = prefix_grant(client)
    router.say(P0, frame)
    assert router.last(D0, PushPrefix) == PushPrefix(client.seq, 0, frame.grant)
    router.say(P0, ended(client))
    push = router.record(client).prefix_push
    assert push is not None
    assert (push.source, push.outcome, push.num_tokens, push.kv_bytes, push.took_ms) == (D0, "landed", HELD, 2400, 3.0)
    assert router.dispatcher.prefixes.outcomes == {(D0, P0, "landed"): 1}
    assert len(router.dispatcher.grants) == 1, "its own grant is out still"


@pytest.mark.parametrize(("num_ranks", "copies"), [(1, 1), (2, 1), (3, 1.5), (4, 2)])
def test_what_a_push_takes_is_predicted_from_the_bytes_that_are_written_copies_too(num_ranks: int, copies: float) -> None:
    """Two KV heads: of more ranks several hold the same one."""
    two_heads = msgspec.structs.replace(KV, groups=(msgspec.structs.replace(KV.groups[0], kv_heads=2),))
    greeting = msgspec.structs.replace(hello(P0, "first"), kv=two_heads, num_ranks=num_ranks)
    peer = PrefillPeer(P0, greeting, lambda _: None)
    assert _bytes_per_token(peer) == copies * two_heads.bytes_per_block / KV.block_size


def test_nothing_is_pushed_that_the_prefill_node_has() -> None:
    router = routing()
    hashes = [HASHER.hash(digest) for digest in HASHER.digests(range(HELD))]
    router.say(P0, CacheEvents(0, True, b"".join(hashes), b""))
    prefilling(router)
    assert router.last(P0, Prefill).prefix is None


@pytest.mark.parametrize(("num_held", "wanted"), [(24, 16), (32, 32), (12, None)])
def test_only_what_fills_blocks_of_the_prefill_nodes_is_pushed(num_held: int, wanted: int | None) -> None:
    router = routing()
    prefill = router.dispatcher.prefills[P0]
    prefill.hello = msgspec.structs.replace(prefill.hello, kv=msgspec.structs.replace(KV, block_size=16))
    prefilling(router, num_held)
    assert router.last(P0, Prefill).prefix == (None if wanted is None else PrefixSource(D0, wanted))


@pytest.mark.parametrize("policy", ["auto", "never"])
def test_nothing_is_pushed_that_is_sooner_computed(policy: PrefixPolicy) -> None:
    router = routing(policy)
    router.say(P0, Measured(PrefillCost(0.0, 1e-9, 0.0), 0.01, 0.001))
    prefilling(router)
    assert router.last(P0, Prefill).prefix is None


def test_a_way_that_was_too_slow_for_long_is_tried_once_more() -> None:
    router = routing("auto")
    router.say(P0, Measured(PrefillCost(0.0, 1e-9, 0.0), 0.01, 0.001))
    asked = []
    for _ in range(2 * FORGOTTEN):
        client = prefilling(router)
        asked.append(router.last(P0, Prefill).prefix is not None)
        router.dispatcher.end(client.seq, "abort")
        router.job_ended(client)
    assert [number for number, is_asked in enumerate(asked, 1) if is_asked] == [FORGOTTEN, 2 * FORGOTTEN]


def test_what_pushes_took_decides_the_next_ones() -> None:
    """A kilobyte a second is not worth it: that is known after three pushes at the latest."""
    router = routing("auto")
    router.say(P0, Measured(PrefillCost(0.0, 0.01, 0.0), 0.01, 0.001))
    asked = []
    for _ in range(4):
        client = prefilling(router)
        asked.append(router.last(P0, Prefill).prefix is not None)
        router.say(P0, ended(client, took_ms=2400.0))
        router.dispatcher.end(client.seq, "abort")
        router.job_ended(client)
    assert asked[0] and not asked[3]


def test_failures_make_no_way_look_fast() -> None:
    router = routing("auto")
    router.say(P0, Measured(PrefillCost(0.0, 0.01, 0.0), 0.01, 0.001))
    cost = None
    for _ in range(20):
        client = prefilling(router)
        router.say(P0, ended(client, "failed", 0, took_ms=0.1))
        way = router.dispatcher.prefixes._ways[D0, P0]
        cost = cost or way.cost
        router.dispatcher.end(client.seq, "abort")
        router.job_ended(client)
    assert cost is not None
    assert way.cost.base_s >= 0.99 * cost.base_s


def test_nothing_is_pushed_over_a_pair_that_is_not_ready() -> None:
    router = routing()
    router.down(P0)
    router.prefill_up(P0, incarnation="second")
    router.pair(P0, D0)
    prefilling(router)
    assert router.last(P0, Prefill).prefix is None


def test_pairs_go_both_ways_only_where_both_share_prefixes() -> None:
    assert {(pair.writer, pair.target) for pair in routing().dispatcher.pairs} == {(P0, D0), (D0, P0)}
    assert {(pair.writer, pair.target) for pair in Routing().dispatcher.pairs} == {(P0, D0)}


def test_a_job_without_a_grant_gets_no_prefix() -> None:
    """One token is wanted and nothing is granted, so decode holds nothing for it."""
    router = routing()
    router.queued(max_tokens=1)
    assert router.last(P0, Prefill).prefix is None


# ── what fails ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_grant_for_a_sequence_that_is_over_is_answered_here() -> None:
    router = routing()
    client = prefilling(router)
    router.dispatcher.end(client.seq, "abort")
    frame = prefix_grant(client)
    router.say(P0, frame)
    assert not router.frames(D0, PushPrefix)
    assert router.last(P0, Quiesced) == Quiesced(frame.grant.token, P0, True)


def test_a_grant_for_another_decode_node_than_the_sequences_is_answered_here() -> None:
    router = routing(decodes=(D0, D1))
    client = prefilling(router)
    other = D1 if router.decode_of(client) == D0 else D0
    frame = prefix_grant(client, other)
    router.say(P0, frame)
    assert not router.frames(other, PushPrefix)
    assert router.last(P0, Quiesced) == Quiesced(frame.grant.token, P0, True)


def test_cancel_quiesce_and_renewal_pass_between_the_two() -> None:
    router = routing()
    client = prefilling(router)
    frame = prefix_grant(client)
    token = frame.grant.token
    router.say(P0, frame)
    router.say(D0, Progress((token,)))
    assert router.last(P0, Progress) == Progress((token,))
    router.say(P0, Cancel(token, D0, P0), ended(client, "failed", 0))
    assert router.last(D0, Cancel) == Cancel(token, D0, P0)
    router.say(D0, Quiesced(token, P0, False))
    assert router.last(P0, Quiesced) == Quiesced(token, P0, False)
    assert router.dispatcher.prefixes.outcomes == {(D0, P0, "failed"): 1}


def test_a_cancel_for_a_decode_node_that_was_lost_is_answered_by_nobody() -> None:
    """Its bytes may still be under way: only a notification over NIXL or a fence may free the blocks."""
    router = routing()
    client = prefilling(router)
    frame = prefix_grant(client)
    router.say(P0, frame)
    router.down(D0)
    router.decode_up(D0, "second")
    router.clear()
    router.say(P0, Cancel(frame.grant.token, D0, P0))
    assert not router.frames(P0, Quiesced) and not router.frames(D0, Cancel)


def test_a_job_that_is_over_forgets_neither_grant_too_early() -> None:
    """That the job's own grant landed says nothing of the prefix's."""
    router = routing()
    client = prefilling(router)
    frame = prefix_grant(client)
    router.say(P0, frame)
    router.tokens(client, 0, 7)
    router.dispatcher.end(client.seq, "stop")
    assert router.last(P0, Abort).seq == client.seq
    router.say(P0, Cancel(frame.grant.token, D0, P0))
    assert router.last(D0, Cancel) == Cancel(frame.grant.token, D0, P0)


def test_what_became_of_it_is_counted_when_nobody_waits_any_more() -> None:
    router = routing()
    client = prefilling(router)
    router.say(P0, prefix_grant(client))
    router.dispatcher.end(client.seq, "abort")
    router.say(P0, ended(client, "stopped", 0))
    assert router.dispatcher.prefixes.outcomes == {(D0, P0, "stopped"): 1}


def test_a_prefill_node_that_was_lost_has_nothing_to_say() -> None:
    router = routing()
    client = prefilling(router)
    router.down(P0)
    router.prefill_up(P0, incarnation="second")
    router.say(P0, ended(client))
    assert not router.dispatcher.prefixes.outcomes
