"""Who holds which block of the KV cache: reference counts, the free list, and prefixes found again by their content.

A full block is known by the digest of all tokens up to its end (a SHA-256 chain that begins with the request's salt),
so equal digests mean equal tokens in equal positions under an equal salt. Only full blocks are shared, and they are
never written again: no copy on write. A released block keeps its content, and its digest, until the free list hands it
out anew; the free list is ordered by last use, and so it is the LRU cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Digest = bytes


def root_digest(salt: str) -> Digest:
    """Where the chain of a request with this salt begins."""
    return hashlib.sha256(b"salt" + salt.encode("utf-8", "surrogatepass")).digest()


def chain_digest(parent: Digest, tokens: Sequence[int]) -> Digest:
    """The digest of a full block whose predecessor, or root, has the digest `parent`."""
    return hashlib.sha256(b"block" + parent + array("i", tokens).tobytes()).digest()


class BlockManager:
    """Hands out, counts and takes back blocks 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._num_references = [0] * num_blocks
        self._digests: list[Digest | None] = [None] * num_blocks
        self._published: dict[Digest, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be reused first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def find(self, digests: Iterable[Digest]) -> list[int]:
        """The blocks of the longest known prefix of a chain. They are not yet held: `hold` them before allocating."""
        blocks = []
        for digest in digests:
            block = self._published.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds; holding them takes that many from the free list."""
        return sum(self._num_references[block] == 0 for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these blocks, found by `find`."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; what they held is forgotten. Needs num_free >= count."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take back one reference of each block of a sequence, given in its order."""
        for block in reversed(blocks):  # the end of a prefix is reused before its beginning
            assert self._num_references[block] > 0, f"block {block} is released but nobody holds it"
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if self._digests[block] is None:  # nothing worth keeping: reuse it first
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, digest: Digest) -> None:
        """Make a full, computed block findable. If another block has the same content, that one stays the known one."""
        assert self._num_references[block] > 0, f"block {block} is published but nobody holds it"
        if self.enable_prefix_caching and self._digests[block] is None and digest not in self._published:
            self._digests[block] = digest
            self._published[digest] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Make the content of these blocks unfindable: it is not to be trusted."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._published[digest]
            self._digests[block] = None

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that all books agree, given the block lists of everyone who holds blocks."""
        held = [0] * self.num_blocks
        for blocks in holders:
            assert len(set(blocks)) == len(blocks), f"a sequence holds a block twice: {blocks}"
            for block in blocks:
                held[block] += 1
        assert held == self._num_references, "reference counts differ from what is held"
        assert set(self._free) == {block for block, count in enumerate(held) if count == 0}, "the free list is wrong"
        published = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert published == self._published, "the digests of blocks differ from the index"
