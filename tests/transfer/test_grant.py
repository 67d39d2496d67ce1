"""The grant book: who may reuse which blocks, over scripted orders of messages."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disaggd.ids import AgentId, BlockId, GrantToken, NodeName, SeqId
from disaggd.transfer.grant import MOVES, GrantBook, GrantRecord, GrantState

QUIESCE_S = 10.0
LEASE_S = 5.0
AGENT, OTHER_AGENT = AgentId("a"), AgentId("b")
A, B, C = (GrantToken(name * 16) for name in (b"a", b"b", b"c"))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> GrantBook:
    return GrantBook(QUIESCE_S, clock)


def add(book: GrantBook, token: GrantToken, num_blocks: int = 2, agent_id: AgentId = AGENT) -> GrantRecord:
    blocks = [BlockId(block) for block in range(num_blocks)]
    return book.add(token, seq_id=SeqId("s-1"), attempt=0, peer=NodeName("p0"), agent_id=agent_id, blocks=blocks, lease_s=LEASE_S)


def test_landed_grant_leaves_with_its_blocks(book: GrantBook) -> None:
    add(book, A)
    record = book.landed(A)
    assert record is not None and record.blocks == (0, 1)
    assert (book.blocks_granted, book.blocks_quarantined, book.next_deadline()) == (0, 0, None)


def test_late_messages_about_a_landed_grant_free_nothing(book: GrantBook) -> None:
    add(book, A)
    book.landed(A)
    assert book.landed(A) is None
    assert book.quarantine(A, "too late") is None
    assert book.quiesced(A, clean=True) is None
    assert book.withdraw(A) is None
    assert book.fenced(NodeName("p0"), AGENT) == []


def test_withdrawn_grant_frees_at_once(book: GrantBook) -> None:
    add(book, A)
    record = book.withdraw(A)
    assert record is not None and record.blocks == (0, 1)
    assert book.get(A) is None


def test_clean_quiesce_frees_quarantined_blocks(book: GrantBook) -> None:
    add(book, A)
    quarantined = book.quarantine(A, "aborted")
    assert quarantined is not None and quarantined.reason == "aborted"
    assert (book.blocks_granted, book.blocks_quarantined) == (0, 2)
    freed = book.quiesced(A, clean=True)
    assert freed is not None and freed.blocks == (0, 1)
    assert book.blocks_quarantined == 0


def test_quarantined_grant_cannot_land_or_be_withdrawn(book: GrantBook) -> None:
    add(book, A)
    book.quarantine(A, "aborted")
    assert book.landed(A) is None
    assert book.withdraw(A) is None
    assert book.blocks_quarantined == 2


def test_unclean_quiesce_keeps_the_blocks_until_the_fence(book: GrantBook) -> None:
    add(book, A)
    book.quarantine(A, "aborted")
    assert book.overdue() == []
    assert book.quiesced(A, clean=False) is None
    assert book.blocks_quarantined == 2
    assert book.overdue() == [("p0", AGENT)]
    assert [record.token for record in book.fenced(NodeName("p0"), AGENT)] == [A]
    assert book.blocks_quarantined == 0


def test_quiesce_of_a_grant_that_was_not_given_up_changes_nothing(book: GrantBook) -> None:
    add(book, A)
    assert book.quiesced(A, clean=True) is None
    assert book.blocks_granted == 2
    assert book.landed(A) is not None


def test_silence_for_quiesce_s_asks_for_one_fence(book: GrantBook, clock: Clock) -> None:
    add(book, A)
    add(book, B)
    book.quarantine(A, "aborted")
    clock.now += QUIESCE_S / 2
    book.quarantine(B, "aborted")
    clock.now += QUIESCE_S / 2
    assert book.overdue() == [("p0", AGENT)]
    assert book.overdue() == [], "the fence was asked for already"
    clock.now += QUIESCE_S
    assert book.overdue() == []
    assert {record.token for record in book.fenced(NodeName("p0"), AGENT)} == {A, B}


def test_quarantine_never_frees_by_itself(book: GrantBook, clock: Clock) -> None:
    add(book, A)
    book.quarantine(A, "aborted")
    clock.now += 1e6
    book.overdue()
    assert book.expired() == []
    assert book.blocks_quarantined == 2


def test_fence_hits_all_grants_of_its_agent_and_no_others(book: GrantBook) -> None:
    add(book, A)
    add(book, B)
    add(book, C, agent_id=OTHER_AGENT)
    book.quarantine(A, "aborted")
    states = {record.token: record.state for record in book.fenced(NodeName("p0"), AGENT)}
    assert states == {A: GrantState.QUARANTINED, B: GrantState.GRANTED}, "B was not given up yet: it needs a new try"
    assert book.get(C) is not None


def test_lease_expires_on_our_clock_unless_renewed(book: GrantBook, clock: Clock) -> None:
    add(book, A)
    add(book, B)
    clock.now += LEASE_S / 2
    book.renew([A, C])
    clock.now += LEASE_S / 2
    assert [record.token for record in book.expired()] == [B]
    assert book.blocks_granted == 4, "expiry frees nothing"
    clock.now += LEASE_S / 2
    assert [record.token for record in book.expired()] == [A, B]


def test_renewal_does_not_bring_a_quarantined_grant_back(book: GrantBook, clock: Clock) -> None:
    add(book, A)
    book.quarantine(A, "lease ran out")
    book.renew([A])
    record = book.get(A)
    assert record is not None and (record.state, record.deadline) == (GrantState.QUARANTINED, clock.now + QUIESCE_S)


def test_next_deadline_is_the_nearest_lease_or_quiesce(book: GrantBook, clock: Clock) -> None:
    assert book.next_deadline() is None
    add(book, A)
    assert book.next_deadline() == clock.now + LEASE_S
    book.quarantine(A, "aborted")
    assert book.next_deadline() == clock.now + QUIESCE_S
    add(book, B)
    assert book.next_deadline() == clock.now + LEASE_S
    book.landed(B)
    clock.now += QUIESCE_S
    book.overdue()
    assert book.next_deadline() is None, "the fence is under way: its end is an event, not a deadline"


def test_grant_made_while_its_agent_is_being_fenced_is_freed_by_that_fence(book: GrantBook) -> None:
    add(book, A)
    book.quarantine(A, "aborted")
    book.quiesced(A, clean=False)
    book.overdue()
    add(book, B)
    book.quarantine(B, "aborted")
    assert book.overdue() == []
    assert {record.token for record in book.fenced(NodeName("p0"), AGENT)} == {A, B}


def test_table_of_moves_is_the_drawn_one() -> None:
    moves = {(before, after) for before, afters in MOVES.items() for after in afters}
    granted, quarantined, landed, freed = GrantState.GRANTED, GrantState.QUARANTINED, GrantState.LANDED, GrantState.FREED
    assert moves == {(granted, landed), (granted, freed), (granted, quarantined), (quarantined, freed)}


STEPS = st.sampled_from(["landed", "withdraw", "quarantine", "clean", "unclean", "tick"])


@given(st.lists(st.tuples(STEPS, st.integers(0, 3)), max_size=40))
def test_blocks_leave_the_book_exactly_once_and_quarantined_ones_only_when_safe(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    book = GrantBook(QUIESCE_S, clock)
    tokens = [GrantToken(bytes([number]) * 16) for number in range(4)]
    for number, token in enumerate(tokens):
        add(book, token, agent_id=(AGENT, OTHER_AGENT)[number % 2])
    left: Counter[GrantToken] = Counter()
    quarantined: set[GrantToken] = set()
    for step, number in steps:
        token = tokens[number]
        match step:
            case "landed" | "withdraw":
                if getattr(book, step)(token):
                    assert token not in quarantined
                    left[token] += 1
            case "quarantine":
                if book.quarantine(token, "given up"):
                    quarantined.add(token)
            case "clean" | "unclean":
                if book.quiesced(token, clean=step == "clean"):
                    assert step == "clean" and token in quarantined
                    left[token] += 1
            case "tick":
                clock.now += QUIESCE_S / 3
                for peer, agent_id in book.overdue():
                    left.update(record.token for record in book.fenced(peer, agent_id))
    for agent_id in (AGENT, OTHER_AGENT):
        left.update(record.token for record in book.fenced(NodeName("p0"), agent_id))
    assert left == Counter(tokens)
    assert (book.blocks_granted, book.blocks_quarantined, book.next_deadline()) == (0, 0, None)
