"""The whole of it: timelines that were worked out by hand, and what holds of every replay."""

import random

import msgspec
import pytest

from disaggd.errors import Overloaded
from disaggd.simulator.cluster import Client, SimulatedCluster, prompt
from disaggd.simulator.costs import Costs
from disaggd.simulator.summary import outcome_of
from disaggd.simulator.traces import Lengths
from disaggd.simulator.wire import Rate
from tests.support.simulations import COSTS, felt_ms, replay, small_setup, with_costs

ONE = [Lengths(num_input=8, num_output=3)]


def many(count: int, seed: int = 1) -> list[Lengths]:
    draw = random.Random(seed)
    rows, at = [], 0.0
    for _ in range(count):
        at += draw.expovariate(40)
        shared = tuple(draw.randrange(6) for _ in range(draw.randrange(4)))
        rows.append(Lengths(arrival_s=at, num_input=draw.randrange(1, 60), num_output=draw.randrange(1, 30), blocks=shared))
    return rows


def test_a_local_prefill_by_hand() -> None:
    """Frame 1, step 10 + 8, frame 1; then a step each."""
    (client,), _ = replay(small_setup("never"), ONE)
    assert felt_ms(client) == [20, 30, 40]
    assert client.record is not None and not client.record.was_remote


def test_a_remote_prefill_by_hand() -> None:
    """The job is with prefill at 3 and computed at 21; its layers, done at 12 and 21, are sent by 15 and 24, and have landed at 26."""
    (client,), _ = replay(small_setup("always"), ONE)
    assert felt_ms(client) == [22, 37, 47]
    assert client.record is not None and client.record.was_remote
    assert client.record.kv_bytes == 1024


def test_a_prompt_goes_in_whole_blocks_of_its_decode_node() -> None:
    """Its one block has room for 16 tokens: a layer's is a kilobyte and 6 ms on the wire, and the second has landed at 29."""
    (client,), _ = replay(small_setup("always", decode_block=16), ONE)
    assert felt_ms(client) == [22, 40, 50]
    assert client.record is not None and client.record.kv_bytes == 2048


def test_a_slow_wire_delays_the_second_token_and_not_the_first() -> None:
    """From the beginning on 512 bytes take 30 ms: the layers are sent by 42 and 72."""
    (client,), _ = replay(small_setup("always", rate_changes=[Rate(0.0, 512 / 30e-3)]), ONE)
    assert felt_ms(client) == [22, 85, 95]


def test_a_wire_that_slows_down_later_slows_down_what_comes_later() -> None:
    rows = [*ONE, Lengths(arrival_s=10.0, num_input=8, num_output=3)]
    (early, late), _ = replay(small_setup("always", rate_changes=[Rate(5.0, 512 / 30e-3)]), rows)
    assert (felt_ms(early), felt_ms(late)) == ([22, 37, 47], [22, 85, 95])


def test_bytes_that_land_take_time_from_the_next_step() -> None:
    """Each half a kilobyte 5 ms, twice: the first step of decode takes 20."""
    (client,), _ = replay(small_setup("always", costs=with_costs(per_received_mb_ms=5e6 / 512)), ONE)
    assert felt_ms(client) == [22, 47, 57]


def test_two_prompts_at_once_share_a_step() -> None:
    (first, second), _ = replay(small_setup("never"), ONE * 2)
    assert felt_ms(first) == felt_ms(second) == [28, 38, 48]


def test_a_prompt_longer_than_the_pool_is_refused() -> None:
    (client,), _ = replay(small_setup("never", num_blocks=4), [Lengths(num_input=16, num_output=2)])
    outcome = outcome_of(client, 0.0)
    assert (outcome.error, outcome.ttft_ms, outcome.output_tokens) == ("context_length_exceeded", None, 0)


def test_requests_beyond_what_the_router_takes_are_refused() -> None:
    clients, _ = replay(small_setup("never", more="[router]\nmax_requests = 2"), ONE * 3)
    assert [outcome_of(client, 0.0).error for client in clients] == [None, None, "rate_limit_exceeded"]


def ended(client: Client) -> bool:
    return client.is_over and client.error is None and len(client.tokens_at) == client.row.num_output


def at_rest(cluster: SimulatedCluster) -> bool:
    pools = [node.engine.pool for node in cluster.nodes.values()]
    nobody = all(not node.engine.sequences for node in cluster.nodes.values()) and not cluster.dispatcher.sequences
    return (
        nobody
        and all(pool.num_available == pool.num_blocks for pool in pools)
        and all(not peer.jobs for peer in cluster.dispatcher.prefills.values())
    )


def decode_nodes(costs: Costs, block_sizes: dict[str, int]) -> list[str | None]:
    """Of two, who served each of six short prompts that came one after another."""
    setup = small_setup("never", decodes=2, num_blocks=256, costs=costs)
    nodes = tuple(msgspec.structs.replace(node, block_size=block_sizes.get(node.name, 4)) for node in setup.config.nodes)
    setup = msgspec.structs.replace(setup, config=msgspec.structs.replace(setup.config, nodes=nodes))
    clients, _ = replay(setup, [Lengths(arrival_s=float(i), num_input=5, num_output=4) for i in range(6)])
    return [client.record.decode for client in clients if client.record is not None]


def test_in_an_idle_cluster_no_block_size_decides() -> None:
    """Five tokens leave less of a block of 12 empty than of one of 16; the first by name has them all the same."""
    assert decode_nodes(COSTS, {"d0": 16, "d1": 12}) == ["d0"] * 6


@pytest.mark.parametrize("block_sizes", [{}, {"d0": 12, "d1": 16}])
def test_an_idle_cluster_serves_short_prompts_on_its_fast_decode_node(block_sizes: dict[str, int]) -> None:
    """A step of d0 takes 50 ms, of d1 10."""
    assert decode_nodes(msgspec.structs.replace(COSTS, by_node={"d0": {"base_ms": 50.0}}), block_sizes) == ["d1"] * 6


LONG_QUEUE = "[disaggregation]\nmax_prefill_queue = 1000"


@pytest.mark.parametrize("policy", ["always", "never", "threshold:16"])
@pytest.mark.parametrize("num_blocks", [24, 64])
def test_every_request_ends_once_and_leaves_nothing_behind(policy: str, num_blocks: int) -> None:
    """In a pool of 24 blocks sequences are preempted and grants refused."""
    clients, cluster = replay(small_setup(policy, prefills=2, decodes=2, num_blocks=num_blocks, more=LONG_QUEUE), many(150))
    assert all(map(ended, clients))
    assert at_rest(cluster)


@pytest.mark.parametrize(("prefill_block", "decode_block"), [(4, 16), (16, 4), (12, 16)])
def test_blocks_of_different_sizes_leave_nothing_behind(prefill_block: int, decode_block: int) -> None:
    setup = small_setup("always", prefills=2, decodes=2, prefill_block=prefill_block, decode_block=decode_block, more=LONG_QUEUE)
    clients, cluster = replay(setup, many(150))
    assert all(map(ended, clients)) and at_rest(cluster)
    assert any(client.record.was_remote for client in clients if client.record is not None)


def test_a_request_that_finds_the_prefill_queue_full_is_refused_and_leaves_nothing_behind() -> None:
    clients, cluster = replay(small_setup("always", more="[disaggregation]\nmax_prefill_queue = 2"), many(150))
    refused = [client for client in clients if isinstance(client.error, Overloaded)]
    assert 0 < len(refused) < 150 and all(ended(client) for client in clients if client not in refused)
    assert at_rest(cluster)


CRAWLING = [Rate(0.0, 512 / 3)]
"""512 bytes take 3 s."""


def test_pushes_that_outlast_their_leases_are_renewed_to_the_last_byte() -> None:
    """What has been written of one waits behind what was posted of others meanwhile, its last piece too."""
    more = "[transfer]\nlease_s = 1\nquiesce_s = 2\n[router]\nrequest_timeout_s = 3600"
    clients, cluster = replay(small_setup("always", rate_changes=CRAWLING, more=more), many(12))
    assert [outcome_of(client, 0.0).retries for client in clients] == [0] * 12
    assert all(map(ended, clients))
    assert at_rest(cluster)


def test_pushes_that_are_given_up_and_do_not_end_are_fenced_and_leave_nothing_behind() -> None:
    """A write takes longer than a node waits for it to end; whoever is fenced by that for others' sake goes on."""
    more = "[transfer]\nlease_s = 1\nquiesce_s = 2\n[router]\nrequest_timeout_s = 60"
    clients, cluster = replay(small_setup("always", rate_changes=CRAWLING, more=more), many(12))
    assert {outcome_of(client, 0.0).error for client in clients} >= {"timeout"}
    assert at_rest(cluster)


def test_requests_that_take_too_long_are_ended_and_leave_nothing_behind() -> None:
    clients, cluster = replay(small_setup("always", more="[router]\nrequest_timeout_s = 0.15"), many(150))
    assert {outcome_of(client, 0.0).error for client in clients} == {None, "timeout"}
    assert at_rest(cluster)


@pytest.mark.parametrize("policy", ["always", "threshold:16"])
def test_the_same_input_has_the_same_outcome(policy: str) -> None:
    one, other = (replay(small_setup(policy, prefills=2, decodes=2, num_blocks=24), many(80))[0] for _ in range(2))
    assert [outcome_of(client, 0.0) for client in one] == [outcome_of(client, 0.0) for client in other]


def test_prompts_have_in_common_what_their_ids_have() -> None:
    first = prompt(0, Lengths(num_input=20, num_output=1, blocks=(7, 8)), 8)
    second = prompt(1, Lengths(num_input=20, num_output=1, blocks=(7, 9)), 8)
    assert len(first) == len(second) == 20
    assert [a == b for a, b in zip(first, second, strict=True)] == [True] * 8 + [False] * 12


def test_a_prompt_is_cut_where_its_ids_say_more() -> None:
    assert prompt(0, Lengths(num_input=10, num_output=1, blocks=(7, 8)), 8) == (16,) * 8 + (18,) * 2
