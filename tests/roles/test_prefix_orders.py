"""Prompts between a decode node and a prefill node that push to each other, under messages and losses in any order.

Every request comes to its end with the tokens of any engine; no block is used that may still be written; and when all is quiet nothing
is held, granted or in quarantine on either side.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from disaggd.cluster.pair_checks import Effort
from disaggd.cluster.peers import PairState
from tests.support import decode_scripts, prefill_scripts
from tests.support.role_nodes import LEASE_S, QUIESCE_S, expected, prompt
from tests.support.role_pair import NODES, RolePair
from tests.support.routing import D0, P0

NAMES = st.sampled_from(NODES)


class PrefixOrders(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.sampled_from([24, 40]),
        sizes=st.sampled_from([(4, 4), (4, 8), (8, 4), (6, 4)]),
        lengths=st.lists(st.integers(16, 50), min_size=1, max_size=3),
        check_pairs=st.booleans(),
    )
    def start(self, num_blocks: int, sizes: tuple[int, int], lengths: list[int], check_pairs: bool) -> None:
        """Decode has something cached, and both ways are open."""
        self.pair = RolePair(num_blocks, prefill_size=sizes[0], decode_size=sizes[1], check_pairs=check_pairs)
        for seed, length in enumerate(lengths):
            self.pair.submit(prompt(length, seed), 2, "local")
        self.pair.come_to_rest()

    @rule(length=st.integers(1, 60), seed=st.integers(0, 2), max_tokens=st.integers(1, 6), override=st.sampled_from(["remote", "local"]))
    def submit(self, length: int, seed: int, max_tokens: int, override: str) -> None:
        self.pair.submit(prompt(length, seed), max_tokens, override)

    @rule(length=st.integers(30, 60), seed=st.integers(0, 2), rounds=st.integers(1, 10))
    def submit_and_talk(self, length: int, seed: int, rounds: int) -> None:
        """What is said is heard; nothing is computed, and no write ends. A prefix is in flight after about ten rounds."""
        self.pair.submit(prompt(length, seed), 3, "remote")
        self.talk(rounds)

    @rule(rounds=st.integers(1, 10))
    def talk(self, rounds: int) -> None:
        for _ in range(rounds):
            for name in NODES:
                for hear in (self.pair.deliver, self.pair.answer, self.pair.hear):
                    hear(name)

    @precondition(lambda self: self.pair.clients)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client, _, _ = data.draw(st.sampled_from(self.pair.clients))
        self.pair.dispatcher.end(client.seq, "abort")
        self.pair.settle()

    @rule(name=NAMES, count=st.integers(1, 4))
    def deliver(self, name: str, count: int) -> None:
        for _ in range(count):
            self.pair.deliver(name)

    @rule(name=NAMES, count=st.integers(1, 4))
    def answer(self, name: str, count: int) -> None:
        for _ in range(count):
            self.pair.answer(name)

    @rule(name=NAMES, count=st.integers(1, 4))
    def hear(self, name: str, count: int) -> None:
        for _ in range(count):
            self.pair.hear(name)

    @rule(name=NAMES)
    def step(self, name: str) -> None:
        self.pair.step(name)

    @precondition(lambda self: self.pair.handles)
    @rule(data=st.data())
    def end_a_handle(self, data: st.DataObject) -> None:
        self.pair.end_handle(data.draw(st.sampled_from(self.pair.handles)))

    @rule(name=NAMES)
    def lose_a_pair(self, name: str) -> None:
        self.pair.lose_pair(name)

    @rule(num_rounds=st.integers(1, 3))
    def check(self, num_rounds: int) -> None:
        """Somebody wants to know whether the pairs work."""
        for pair in self.pair.dispatcher.pairs:
            self.pair.dispatcher.pairs.check(pair, Effort(num_rounds, 1.0), lambda _: None)
        self.pair.settle()

    @rule(seconds=st.sampled_from([0.0, 1.0, LEASE_S, QUIESCE_S]))
    def time_passes(self, seconds: float) -> None:
        self.pair.after(seconds)

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        self.pair.come_to_rest()
        for client, tokens, max_tokens in self.pair.clients:
            wanted = expected(tokens, max_tokens)
            assert client.error is None
            assert client.tokens == wanted if client.finish else client.tokens == wanted[: len(client.tokens)]
        assert not self.pair.dispatcher.sequences and not self.pair.handles
        assert prefill_scripts.is_idle(self.pair.nodes[P0].node)
        assert decode_scripts.is_empty(self.pair.nodes[D0].node)
        assert not len(self.pair.dispatcher.grants)


PrefixOrders.TestCase.settings = settings(max_examples=40, stateful_step_count=50)
TestPrefixOrders = PrefixOrders.TestCase


@pytest.mark.parametrize("lost_after", range(0, 24, 2))
def test_a_pair_that_is_lost_in_the_middle_of_its_check_is_probed_and_checked_anew(lost_after: int) -> None:
    pair = RolePair(24, check_pairs=True)
    for _ in range(lost_after):
        for name in NODES:
            for hear in (pair.deliver, pair.answer, pair.hear):
                hear(name)
    for name in NODES:
        pair.lose_pair(name)
    pair.come_to_rest()
    for way in pair.dispatcher.pairs:
        assert (way.state, way.reason) == (PairState.READY, "")
        assert way.agent is not None and way.checked == way.agent.agent_id
    assert prefill_scripts.is_idle(pair.nodes[P0].node) and decode_scripts.is_empty(pair.nodes[D0].node)
    assert not len(pair.dispatcher.grants)


def test_prefixes_do_go_back_and_are_found() -> None:
    """That the machine above comes to what it is for."""
    pair = RolePair(64)
    pair.submit(prompt(40), 2, "local")
    pair.come_to_rest()
    pair.submit(prompt(60), 4, "remote")
    pair.come_to_rest()
    assert pair.dispatcher.prefixes.outcomes == {(D0, P0, "landed"): 1}
    assert pair.nodes[P0].node.engine.cache.hit_tokens == 40
    assert [client.tokens for client, _, _ in pair.clients] == [expected(prompt(40), 2), expected(prompt(60), 4)]
