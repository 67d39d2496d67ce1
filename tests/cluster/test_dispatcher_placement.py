"""Where requests go: by what nodes have cached, by load, by conversation; and what decode nodes are offered."""

from collections.abc import Sequence
from typing import Any

import pytest

from disaggd.cluster.offer import PrefillCost
from disaggd.cluster.protocol import CacheEvents, CacheSnapshot, Decided, Measured
from disaggd.errors import Overloaded
from disaggd.ids import NodeName
from disaggd.prefix import PrefixHasher
from tests.support.routing import D0, D1, KV, P0, P1, Client, Routing, gauges

HASHER = PrefixHasher("model", KV.dtype, KV.block_size)


def hashes(tokens: Sequence[int], salt: str = "") -> bytes:
    return b"".join(HASHER.hash(digest) for digest in HASHER.digests(tokens, salt))


def holds(routing: Routing, name: NodeName, num_tokens: int, salt: str = "") -> None:
    """The node has the first tokens of every prompt that these tests send."""
    routing.say(name, CacheEvents(0, True, hashes(range(num_tokens), salt), b""))


def placed(routing: Routing, num_tokens: int = 40, **asked: Any) -> NodeName:
    return routing.decode_of(routing.submit(num_tokens, **asked))


# ── decode nodes ──


def test_a_request_goes_where_its_prompt_is_cached() -> None:
    routing = Routing(decodes=(D0, D1))
    holds(routing, D1, 20)
    assert placed(routing, 40) == D1
    assert placed(routing, 4) == D0, "all of a block is cached there, but the last token is computed anyway; and d1 has work"


def test_what_is_cached_of_a_prompt_needs_no_memory_of_its_own() -> None:
    """A system prompt that all requests share fits a pool that could not hold it for each."""
    routing = Routing(kv_overcommit=1.0)
    holds(routing, D0, 200)
    for _ in range(6):
        placed(routing, 220, max_tokens=20)
    with pytest.raises(Overloaded):
        placed(routing, 220, max_tokens=20)
    assert routing.dispatcher.admission.num_tokens == 6 * 40


def test_a_busy_node_is_left_alone_when_its_cache_is_not_worth_it() -> None:
    routing = Routing(decodes=(D0, D1))
    holds(routing, D1, 20)
    assert [placed(routing, 40) for _ in range(3)] == [D1, D0, D1]


def test_a_cache_of_another_salt_is_no_cache() -> None:
    routing = Routing(decodes=(D0, D1))
    holds(routing, D1, 40, "tenant")
    assert placed(routing, 40) == D0
    assert placed(routing, 40, cache_salt="tenant") == D1


def test_a_node_whose_events_went_missing_is_asked_for_all_and_holds_nothing_until_then() -> None:
    routing = Routing(decodes=(D0, D1))
    holds(routing, D1, 40)
    routing.say(D1, CacheEvents(5, False, b"", b""))
    assert len(routing.frames(D1, CacheSnapshot)) == 1
    assert placed(routing, 40) == D0
    routing.say(D1, CacheEvents(6, True, hashes(range(40)), b""))
    assert placed(routing, 40) == D1


def test_a_node_that_was_restarted_holds_nothing() -> None:
    routing = Routing(decodes=(D0, D1))
    holds(routing, D1, 40)
    routing.down(D1)
    routing.decode_up(D1, "second")
    assert placed(routing, 40) == D0


def test_generated_tokens_count_as_load() -> None:
    routing = Routing(decodes=(D0, D1))
    first, second = routing.decoding(40), routing.decoding(44)
    assert [routing.decode_of(client) for client in (first, second)] == [D0, D1]
    for start in range(8):
        routing.tokens(first, start, 7)
    assert placed(routing, 10) == D1
    routing.dispatcher.end(first.seq, "abort")
    assert routing.dispatcher.decodes[D0].load_tokens == 0


def test_a_node_without_blocks_for_the_prompt_comes_last() -> None:
    routing = Routing(decodes=(D0, D1))
    routing.say(D0, gauges(blocks_free=10))
    assert placed(routing, 40) == D1
    assert placed(routing, 39) == D0


def test_a_node_that_measured_itself_far_slower_gets_nothing_while_another_is_idle() -> None:
    routing = Routing(decodes=(D0, D1))
    cost = PrefillCost(0.0, 1e-4, 0.0)
    routing.say(D0, Measured(cost, 0.0348, 0.0))
    routing.say(D1, Measured(cost, 0.0027, 0.0003))
    assert [placed(routing, 40) for _ in range(4)] == [D1, D1, D1, D1]
    routing.say(D1, gauges(blocks_free=1))
    assert placed(routing, 40) == D0


def test_a_node_that_comes_back_faster_is_known_by_its_new_speed() -> None:
    routing = Routing(decodes=(D0, D1))
    routing.say(D0, Measured(PrefillCost(0.0, 1e-4, 0.0), 0.04, 0.0))
    routing.say(D1, Measured(PrefillCost(0.0, 1e-4, 0.0), 0.01, 0.0))
    assert placed(routing, 40) == D1
    routing.down(D0)
    routing.decode_up(D0, "second")
    routing.say(D0, Measured(PrefillCost(0.0, 1e-4, 0.0), 0.01, 0.0))
    assert placed(routing, 40) == D0


# ── conversations ──


def turn(routing: Routing, session: str | None, num_tokens: int = 40) -> tuple[NodeName, Client]:
    client = routing.submit(num_tokens, session=session)
    return routing.decode_of(client), client


def test_a_conversation_stays_where_it_was() -> None:
    routing = Routing(decodes=(D0, D1))
    _, other = turn(routing, None)
    node, mine = turn(routing, "mine")
    assert node == D1
    for client in (other, mine):
        routing.dispatcher.end(client.seq, "abort")
    assert turn(routing, "mine")[0] == D1
    assert turn(routing, "another")[0] == D0


def test_a_conversation_moves_with_its_load_and_stays_there() -> None:
    routing = Routing(decodes=(D0, D1))
    assert turn(routing, "mine")[0] == D0
    routing.submit(200)
    assert turn(routing, "mine")[0] == D0
    assert turn(routing, "mine", 400)[0] == D0
    assert turn(routing, "mine")[0] == D1, "200 tokens against 480"
    assert routing.dispatcher.decodes[D1].load_tokens == 240


# ── prefill nodes ──


def test_a_job_goes_to_the_prefill_node_that_has_its_prompt() -> None:
    routing = Routing(prefills=(P0, P1))
    holds(routing, P1, 32)
    assert routing.record(routing.queued(40)).prefill == P1
    assert routing.record(routing.queued(40)).prefill == P1, "8 tokens wait there, and 8 are to be computed: less than 40"


def test_what_a_prefill_node_has_cached_is_part_of_the_offer() -> None:
    routing = Routing(prefills=(P0, P1))
    holds(routing, P1, 40)
    offer = routing.offer(routing.submit(40))
    assert (offer.prefill, offer.num_cached, offer.prefill_nodes) == (P1, 36, 2)


def test_the_offer_tells_the_wait_and_the_speed_of_the_node_it_names() -> None:
    routing = Routing(credit=100, max_prefill_queue=4)
    cost = PrefillCost(0.1, 0.01, 0.0001)
    routing.say(P0, Measured(cost, 0.0, 0.0))
    idle = routing.offer(routing.submit(100))
    assert (idle.wait_s, idle.may_grant, idle.prefill_cost) == (0.0, True, cost)
    routing.dispatcher.end(next(iter(routing.dispatcher.sequences)), "abort")
    each = 0.1 + 100 * (0.01 + 0.0001 * 50)
    routing.prefilling(100)
    routing.now += 0.5
    routing.queued(100)
    behind = routing.offer(routing.submit(100))
    assert not behind.may_grant
    assert abs(behind.wait_s - (2 * each - 0.5)) < 0.01


def test_without_a_prefill_node_there_is_no_offer() -> None:
    routing = Routing(prefills=())
    client = routing.submit(40)
    routing.say(D0, Decided(client.seq, 0, "no_prefill_node: none", 0))
    assert routing.generated(client).offer is None


def measured_routing(*decodes: NodeName) -> Routing:
    """A prompt token takes 10 ms."""
    routing = Routing(decodes=decodes)
    routing.say(P0, Measured(PrefillCost(0.0, 0.01, 0.0), 0.0, 0.0))
    return routing


def test_what_a_decode_node_has_yet_to_decide_is_its_own_to_count_and_others_count_it_by_the_share_that_it_sends_elsewhere() -> None:
    routing = measured_routing(D0, D1)
    first, second, third = (routing.submit(100) for _ in range(3))
    assert [routing.decode_of(client) for client in (first, second, third)] == [D0, D1, D0]
    offers = [routing.offer(client) for client in (first, second, third)]
    assert [offer.wait_s for offer in offers] == [0.0, 0.5, 0.5], "of others half, as long as nothing is known of them"
    assert [offer.num_decisions for offer in offers] == [0, 0, 0]
    routing.say(D0, Decided(first.seq, 0, "cheaper: here", 0))
    assert routing.dispatcher.decodes[D0].remote_share < 0.5
    assert routing.decode_of(routing.submit(100)) == D1
    assert routing.offer(routing.submit(100)).num_decisions == 1, "d0's"


def test_a_decode_node_that_is_lost_with_offers_that_it_has_not_answered_holds_nobody_up() -> None:
    routing = measured_routing(D0, D1)
    clients = [routing.submit(100) for _ in range(4)]
    routing.down(D0)
    assert {routing.decode_of(client) for client in clients} == {D1}


def test_a_prefill_node_is_thought_to_work_on_all_that_it_was_sent_and_what_is_late_is_expected_any_moment() -> None:
    """Prompts share steps: that the first has not been reported says nothing of the second."""
    routing = measured_routing(D0)
    first, *_ = [routing.prefilling(100) for _ in range(3)]
    waits = []
    for seconds in (0.0, 1.5, 5.0):
        routing.now = 100.0 + seconds
        client = routing.submit(100)
        waits.append(round(routing.offer(client).wait_s, 3))
        routing.dispatcher.end(client.seq, "abort")
    assert waits == [3.0, 1.5, 0.0]
    routing.first_token(first, 7)
    assert abs(routing.offer(routing.submit(100)).wait_s - 2.0) < 0.1, "the report says what is left"
