"""Who gets how many tokens computed in the next step.

There are no phases. Each step gives tokens to sequences whose computed count is behind their known count, within a
token budget: first to those that lack one token (decoding), then to the others in order of arrival (chunked prefill),
then to new ones while there is room. A new sequence takes over the blocks of its longest known prefix, and blocks for
all its known tokens; running ones grow by one block at a time. When none is left, the sequence admitted last gives up
its blocks and is computed again later, so that the one admitted first always goes on and everyone ends in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from aphroquant.engine.block_manager import BlockManager, chain_digest
from aphroquant.engine.sequence import Sequence, State

S = TypeVar("S", bound=Sequence)


class Scheduled(NamedTuple, Generic[S]):
    """`num_tokens` of the sequence, from its computed count on, are computed in this step."""

    sequence: S
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """True if all known tokens are computed after this step: the last row's logits choose the next token."""
        return self.sequence.num_remaining == self.num_tokens


class _Step(Generic[S]):
    """A step in the making: the tokens given to each sequence, and what is left of the budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.counts: dict[S, int] = {}

    def give(self, sequence: S, num_tokens: int) -> None:
        self.counts[sequence] = num_tokens
        self.budget -= num_tokens

    def take_back(self, sequence: S) -> None:
        self.budget += self.counts.pop(sequence, 0)


class Scheduler(Generic[S]):
    """First come, first served, in steps of at most `max_num_batched_tokens` tokens and `max_num_seqs` sequences."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[S] = deque()
        self.running: list[S] = []  # in order of admission
        self._is_full = False  # nobody who waits can be admitted until somebody ends
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # tokens looked up and
        self.num_prefix_hits = 0  # found in the prefix cache at first admission

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def __iter__(self) -> Iterator[S]:
        yield from self.running
        yield from self.waiting

    def add(self, sequence: S) -> None:
        """Queue a sequence. Its prompt and all its output must fit into the cache when it is alone there."""
        self.waiting.append(sequence)
        self._is_full = False

    def finish(self, sequence: S, *, reusable: bool = True) -> None:
        """Take a sequence out, whatever its state, and its blocks back; their content stays known if `reusable`."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            if not reusable:
                self.blocks.withdraw(sequence.blocks)
            self.blocks.release(sequence.drop_blocks())
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        self._is_full = False
        sequence.state = State.FINISHED

    def schedule(self) -> list[Scheduled[S]]:
        """The next step. It must be computed, and reported by `computed`, before the next call."""
        step: _Step[S] = _Step(self.max_num_batched_tokens)
        num_preemptions = self.num_preemptions
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_remaining > 1):
            num_tokens = min(sequence.num_remaining, step.budget)
            if num_tokens and sequence.state is State.RUNNING and self._make_room(sequence, num_tokens, step):
                step.give(sequence, num_tokens)
        if self.num_preemptions == num_preemptions:
            self._admit(step)
        return [Scheduled(sequence, num_tokens) for sequence, num_tokens in step.counts.items()]

    def make_room_ahead(self, step: list[Scheduled[S]], sequences: list[S]) -> bool:
        """Make room for one token more of `sequences`, all out of `step`, before the tokens that it gives are known.

        False if the step after it must not be the decoding of these sequences alone: some are still being read, others
        may be admitted, or somebody would have to give up blocks.
        """
        may_admit = self.waiting and not self._is_full and len(self.running) < self.max_num_seqs
        if may_admit or not sequences or not all(scheduled.is_complete for scheduled in step):
            return False
        if not {scheduled.sequence for scheduled in step}.issuperset(self.running):
            return False
        needed = [self.blocks.blocks_for(len(sequence.token_ids) + 1) - len(sequence.blocks) for sequence in sequences]
        if sum(needed) > self.blocks.num_free:
            return False
        for sequence, count in zip(sequences, needed, strict=True):
            if count > 0:
                sequence.add_blocks(self.blocks.allocate(count))
        return True

    def computed(self, step: list[Scheduled[S]]) -> None:
        """Account for a step that has been computed; call it before tokens are appended."""
        for sequence, num_tokens in step:
            first_full = sequence.num_computed // self.blocks.block_size
            sequence.num_computed += num_tokens
            if self.blocks.enable_prefix_caching:
                for block in range(first_full, sequence.num_computed // self.blocks.block_size):
                    self._extend_digests(sequence, block + 1)
                    self.blocks.publish(sequence.blocks[block], sequence.digests[block])

    def _make_room(self, sequence: S, num_tokens: int, step: _Step[S]) -> bool:
        """Allocate what `num_tokens` more tokens need, at the cost of the last admitted; False if that was itself."""
        needed = self.blocks.blocks_for(sequence.num_computed + num_tokens) - len(sequence.blocks)
        if needed <= 0:
            return True
        while self.blocks.num_free < needed:
            victim = self.running[-1]
            step.take_back(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.add_blocks(self.blocks.allocate(needed))
        return True

    def _preempt(self, sequence: S) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.drop_blocks())
        sequence.state = State.WAITING
        self.waiting.appendleft(sequence)  # it came before everyone who still waits
        self.num_preemptions += 1

    def _admit(self, step: _Step[S]) -> None:
        skipped: list[S] = []
        self._is_full = False
        while self.waiting and step.budget and len(self.running) < self.max_num_seqs:
            sequence = self.waiting.popleft()
            if not sequence.is_ready:
                skipped.append(sequence)
                continue
            if not self._take_blocks(sequence):
                self.waiting.appendleft(sequence)
                self._is_full = True
                break
            sequence.state = State.RUNNING
            self.running.append(sequence)
            step.give(sequence, min(sequence.num_remaining, step.budget))
        self.waiting.extendleft(reversed(skipped))

    def _take_blocks(self, sequence: S) -> bool:
        """Give a new sequence its known prefix and blocks for the rest of its tokens; False if they are not there.

        One more free block for each running sequence has to remain, so that a newcomer is not preempted at once.
        """
        prefix = self._known_prefix(sequence)
        needed = self.blocks.blocks_for(len(sequence.token_ids)) - len(prefix)
        if self.blocks.num_free < needed + self.blocks.num_idle(prefix) + len(self.running):
            return False
        self.blocks.hold(prefix)
        sequence.add_blocks(prefix + self.blocks.allocate(needed))
        sequence.num_computed = len(prefix) * self.blocks.block_size
        if not sequence.num_admissions:
            sequence.num_cached_tokens = sequence.num_computed
            self.num_prefix_queries += len(sequence.token_ids)
            self.num_prefix_hits += sequence.num_computed
        sequence.num_admissions += 1
        return True

    def _known_prefix(self, sequence: S) -> list[int]:
        """Blocks already computed; the last token is never among them, because its logits are needed."""
        if not self.blocks.enable_prefix_caching:
            return []
        num_blocks = (len(sequence.token_ids) - 1) // self.blocks.block_size
        self._extend_digests(sequence, num_blocks)
        return self.blocks.find(sequence.digests[:num_blocks])

    def _extend_digests(self, sequence: S, num_blocks: int) -> None:
        size = self.blocks.block_size
        for block in range(len(sequence.digests), num_blocks):
            tokens = sequence.token_ids[block * size : (block + 1) * size]
            sequence.digests.append(chain_digest(sequence.previous_digest(block), tokens))

    def check(self) -> None:
        """Assert that every invariant between sequences and blocks holds."""
        self.blocks.check(sequence.blocks for sequence in self)
        for sequence in self.running:
            assert sequence.state is State.RUNNING
            assert sequence.num_computed <= len(sequence.blocks) * self.blocks.block_size
            assert sequence.block_table[: len(sequence.blocks)].tolist() == sequence.blocks
        for sequence in self.waiting:
            assert sequence.state is State.WAITING
            assert not sequence.blocks
        assert len(self.running) <= self.max_num_seqs
