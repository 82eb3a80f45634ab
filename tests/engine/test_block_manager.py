"""Blocks are never leaked, never given out twice, and found again exactly when their content is the same."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aphroquant.engine.block_manager import BlockManager, chain_digest, root_digest

NUM_BLOCKS, BLOCK_SIZE = 7, 2


def digests(tokens: list[int], salt: str = "") -> list[bytes]:
    chain, parent = [], root_digest(salt)
    for start in range(0, len(tokens) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
        parent = chain_digest(parent, tokens[start : start + BLOCK_SIZE])
        chain.append(parent)
    return chain


def filled(manager: BlockManager, tokens: list[int], salt: str = "") -> list[int]:
    blocks = manager.allocate(len(tokens) // BLOCK_SIZE)
    for block, digest in zip(blocks, digests(tokens, salt), strict=True):
        manager.publish(block, digest)
    return blocks


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences come, share prefixes, grow, publish and go; a model remembers what each block was published with."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.sequences: list[tuple[list[int], str, list[int]]] = []  # tokens, salt, blocks
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # block -> salt and the tokens up to its end

    @rule(tokens=st.lists(st.integers(0, 1), max_size=8), salt=st.sampled_from(["", "a"]))
    def admit(self, tokens: list[int], salt: str) -> None:
        found = self.manager.find(digests(tokens, salt))
        for index, block in enumerate(found):
            assert self.content[block] == (salt, tuple(tokens[: (index + 1) * BLOCK_SIZE]))
        needed = self.manager.blocks_for(len(tokens)) - len(found)
        if self.manager.num_free < needed + self.manager.num_idle(found):
            return
        self.manager.hold(found)
        fresh = self.manager.allocate(needed)
        in_use = {block for _, _, blocks in self.sequences for block in blocks}
        assert not in_use & set(fresh), "a block in use was handed out"
        for block in fresh:
            self.content.pop(block, None)
        self.sequences.append((tokens, salt, found + fresh))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        tokens, salt, blocks = data.draw(st.sampled_from(self.sequences))
        for index, digest in enumerate(digests(tokens, salt)):
            self.manager.publish(blocks[index], digest)
            self.content.setdefault(blocks[index], (salt, tuple(tokens[: (index + 1) * BLOCK_SIZE])))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.manager.release(self.sequences.pop(index)[2])

    @invariant()
    def books_agree(self) -> None:
        self.manager.check(blocks for _, _, blocks in self.sequences)

    def teardown(self) -> None:
        for _, _, blocks in self.sequences:
            self.manager.release(blocks)
        assert self.manager.num_free == NUM_BLOCKS


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_released_prefix_is_found_again() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    blocks = filled(manager, [1, 2, 3, 4])
    manager.release(blocks)
    assert manager.find(digests([1, 2, 3, 4, 5, 6])) == blocks


def test_a_prefix_is_not_found_under_another_salt() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    filled(manager, [1, 2], "alice")
    assert manager.find(digests([1, 2], "bob")) == []
    assert manager.find(digests([1, 2])) == []


def test_the_same_tokens_at_another_position_are_not_the_same_block() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    filled(manager, [1, 2, 3, 4])
    assert manager.find(digests([3, 4])) == []


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    old, new = filled(manager, [1, 2, 3, 4]), filled(manager, [5, 6, 7, 8])
    manager.release(old)
    manager.release(new)
    assert manager.allocate(1) == [old[1]]
    assert manager.find(digests([1, 2, 3, 4])) == [old[0]]
    assert manager.find(digests([5, 6, 7, 8])) == new


def test_blocks_without_content_are_reused_before_cached_ones() -> None:
    manager = BlockManager(3, BLOCK_SIZE)
    cached, scratch = filled(manager, [1, 2]), manager.allocate(2)
    manager.release(cached)
    manager.release(scratch)
    assert set(manager.allocate(2)) == set(scratch)
    assert manager.find(digests([1, 2])) == cached


def test_a_second_block_with_the_same_content_stays_private() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    first, second = filled(manager, [1, 2]), filled(manager, [1, 2])
    manager.release(second)
    manager.release(first)
    assert manager.find(digests([1, 2])) == first


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    manager = BlockManager(4, BLOCK_SIZE, enable_prefix_caching=False)
    filled(manager, [1, 2])
    assert manager.find(digests([1, 2])) == []


def test_releasing_a_block_that_nobody_holds_is_caught() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="nobody holds"):
        manager.release(blocks)


def test_a_salt_cannot_imitate_a_block() -> None:
    parent = root_digest("")
    assert root_digest("block") != chain_digest(parent, [])
