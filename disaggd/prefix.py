"""What names a cached block: the digest of all tokens up to its end, chained block by block.

Whoever keeps or looks for cached blocks makes the same digests of the same tokens: engine nodes of their pools' blocks, the router of
a prompt. Pure arithmetic; knows nothing of pools, links or text.
"""

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from disaggd.ids import BlockHash

DIGEST_BYTES = 32
HASH_BYTES = 16
TOKEN_BYTES = 4


class PrefixHasher:
    """The chain of one model with one KV dtype, in blocks of one size: KV made under other terms has other names.

    `hash_bytes` is for tests, which provoke collisions with 1.
    """

    def __init__(self, model_id: str, dtype: str, block_size: int, hash_bytes: int = HASH_BYTES) -> None:
        assert block_size > 0 and 0 < hash_bytes <= DIGEST_BYTES
        self.block_size = block_size
        self._terms = (model_id, dtype, str(block_size))
        self._hash_bytes = hash_bytes

    def digests(self, tokens: Sequence[int], salt: str = "", known: Sequence[bytes] = ()) -> list[bytes]:
        """The digest of every full block of `tokens`, 32 bytes each; `known` are those of the first blocks, made earlier.

        Requests of different `salt` share nothing. About 3 µs a block of 64 tokens.
        """
        found = list(known)
        before = found[-1] if found else self._root(salt)
        words = memoryview(_pack(tokens[len(found) * self.block_size :]))
        stride = self.block_size * TOKEN_BYTES
        for end in range(stride, len(words) + 1, stride):
            block = blake2b(before, digest_size=DIGEST_BYTES)
            block.update(words[end - stride : end])
            before = block.digest()
            found.append(before)
        return found

    def hash(self, digest: bytes) -> BlockHash:
        """What stands for a digest on the wire and in indexes. Two digests may share one: compare them before KV is reused."""
        return BlockHash(digest[: self._hash_bytes])

    def _root(self, salt: str) -> bytes:
        """Each term goes in with its length before it, so that no two lists of terms are one string."""
        root = blake2b(digest_size=DIGEST_BYTES)
        for term in (*self._terms, salt):
            raw = term.encode()
            root.update(len(raw).to_bytes(8, "little"))
            root.update(raw)
        return root.digest()


def _pack(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32, as they travel: nodes of any byte order agree on the digests."""
    words = array("I", tokens)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()
