"""What of a prompt each node has cached, where nodes differ in model, dtype or block size: one chain of hashes for each."""

import msgspec

from disaggd.cluster.cache_book import CacheBook
from disaggd.cluster.protocol import CacheEvents
from disaggd.cluster.request import Request, RoutedSequence, Timeline
from disaggd.ids import BlockHash, NodeName, SeqId
from disaggd.prefix import PrefixHasher
from disaggd.sampling import SamplingParams
from tests.support.role_nodes import kv_of
from tests.support.routing import D0, D1, P0, Client, hello

PROMPT = tuple(range(200))


def book(**sizes: int) -> CacheBook:
    """Nodes by name, with blocks of such sizes."""
    made = CacheBook()
    for name, size in sizes.items():
        made.node_up(NodeName(name), msgspec.structs.replace(hello(NodeName(name), "first"), kv=kv_of(size)))
    return made


def hashes(block_size: int, num_tokens: int) -> list[BlockHash]:
    hasher = PrefixHasher("model", "float32", block_size)
    return [hasher.hash(digest) for digest in hasher.digests(PROMPT[:num_tokens])]


def store(caches: CacheBook, name: NodeName, stored: list[BlockHash]) -> None:
    assert not caches.on_events(name, CacheEvents(0, True, b"".join(stored), b""))


def sequence() -> RoutedSequence:
    request = Request(id="r", prompt=PROMPT, sampling=SamplingParams())
    return RoutedSequence(SeqId("s"), request, Client(), deadline=60.0, timeline=Timeline(arrived=0.0))


def test_each_node_is_asked_for_blocks_of_its_own_size_and_answers_in_tokens() -> None:
    caches = book(p0=16, d0=64, d1=48)
    store(caches, P0, hashes(16, 100))
    store(caches, D0, hashes(64, 150))
    store(caches, D1, hashes(48, 47))
    assert caches.cached_tokens(sequence()) == {P0: 96, D0: 128, D1: 0}


def test_a_block_of_another_size_is_no_block_though_its_tokens_are_the_same() -> None:
    caches = book(p0=64, d0=16)
    store(caches, P0, hashes(16, 160))
    store(caches, D0, hashes(16, 160))
    assert caches.cached_tokens(sequence()) == {P0: 0, D0: 160}


def test_nodes_of_one_size_share_a_chain() -> None:
    caches = book(p0=16, d0=16, d1=64)
    store(caches, D0, hashes(16, 64))
    record = sequence()
    assert caches.cached_tokens(record) == {P0: 0, D0: 64, D1: 0}
    assert sorted(len(chain) for chain in record.digests.values()) == [3, 12], "one for each size, and no more"


def test_the_last_token_is_computed_whatever_the_size() -> None:
    caches = book(p0=8, d0=100)
    store(caches, P0, hashes(8, 200))
    store(caches, D0, hashes(100, 200))
    assert caches.cached_tokens(sequence()) == {P0: 192, D0: 100}
