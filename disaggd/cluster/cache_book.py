"""How much of a sequence every node has cached, in tokens. Runs on the router's loop.

Puts the index of cached blocks together with the names that a sequence's own blocks have: one chain of them for each
model, KV dtype and block size that some node works with.
"""

from disaggd.cluster.cache_index import CacheIndex
from disaggd.cluster.hello import NodeHello
from disaggd.cluster.protocol import CacheEvents
from disaggd.cluster.request import RoutedSequence
from disaggd.ids import NodeName
from disaggd.prefix import PrefixHasher


class CacheBook:
    """Every node whose link is up, prefill and decode alike."""

    def __init__(self) -> None:
        self.index = CacheIndex()
        self._hashers: dict[tuple[str, str, int], PrefixHasher] = {}
        self._hasher_of: dict[NodeName, PrefixHasher] = {}

    def node_up(self, name: NodeName, hello: NodeHello) -> None:
        terms = (hello.model_id, hello.kv.dtype, hello.kv.block_size)
        if terms not in self._hashers:
            self._hashers[terms] = PrefixHasher(*terms)
        self._hasher_of[name] = self._hashers[terms]
        self.index.node_up(name)

    def node_down(self, name: NodeName) -> None:
        self._hasher_of.pop(name, None)
        self.index.node_down(name)

    def on_events(self, name: NodeName, events: CacheEvents) -> bool:
        """See `CacheIndex.on_events`."""
        return self.index.on_events(name, events)

    def cached_tokens(self, record: RoutedSequence) -> dict[NodeName, int]:
        """Of what a node would have to compute for the sequence now, its last token, which is always computed, aside."""
        if not len(self.index):
            return dict.fromkeys(self._hasher_of, 0)
        found: dict[NodeName, int] = {}
        for hasher in set(self._hasher_of.values()):
            known = record.digests.get(hasher, [])
            record.digests[hasher] = digests = hasher.digests(record.tokens, record.request.cache_salt, known)
            of_use = digests[: (record.num_tokens - 1) // hasher.block_size]
            counts = self.index.cached_blocks([hasher.hash(digest) for digest in of_use])
            found |= {name: counts[name] * hasher.block_size for name, its in self._hasher_of.items() if its is hasher}
        return found
