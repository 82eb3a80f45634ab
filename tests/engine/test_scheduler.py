"""Every sequence ends, in fair order, with the right keys in its blocks, whatever the budget and the memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.engine.block_manager import BlockManager
from aphroquant.engine.scheduler import Scheduled, Scheduler
from aphroquant.engine.sequence import Sequence, State

BLOCK_SIZE = 4


def make_scheduler(
    *, num_blocks: int = 64, max_num_seqs: int = 8, max_num_batched_tokens: int = 16, caching: bool = True
) -> Scheduler[Sequence]:
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=caching)
    return Scheduler(blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


class Simulation:
    """A scheduler with a pretended model: a slot remembers the salt and the whole prefix that its key was made from."""

    def __init__(self, scheduler: Scheduler[Sequence], seed: int = 0) -> None:
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.memory: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.salts: dict[Sequence, str] = {}
        self.lengths: dict[Sequence, int] = {}
        self.order_of_end: list[Sequence] = []

    def add(self, prompt: list[int], num_output: int, salt: str = "", leader: Sequence | None = None) -> Sequence:
        sequence = Sequence(prompt, cache_salt=salt, leader=leader)
        self.salts[sequence], self.lengths[sequence] = salt, len(prompt) + num_output
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Scheduled[Sequence]]:
        step = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(scheduled.num_tokens for scheduled in step) <= self.scheduler.max_num_batched_tokens
        for sequence, num_tokens in step:
            self.compute(sequence, num_tokens)
        complete = [scheduled.sequence for scheduled in step if scheduled.is_complete]
        self.scheduler.computed(step)
        for sequence in complete:
            sequence.token_ids.append(self.random.randrange(3))
            if len(sequence.token_ids) == self.lengths[sequence]:
                self.scheduler.finish(sequence)
                self.order_of_end.append(sequence)
        self.scheduler.check()
        return step

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        assert num_tokens > 0
        end = sequence.num_computed + num_tokens
        known = [(self.salts[sequence], tuple(sequence.token_ids[: position + 1])) for position in range(end)]
        slots = [sequence.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(end)]
        for position in range(sequence.num_computed, end):
            self.memory[slots[position]] = known[position]
        assert [self.memory[slot] for slot in slots] == known, "attention would read another sequence's keys"

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished:
                break
            assert self.step(), "a step did nothing although work was left"
        assert not self.scheduler.has_unfinished
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=20),  # prompt
            st.integers(1, 20),  # output tokens
            st.sampled_from("ab"),  # salt
            st.integers(0, 3),  # steps before the next arrival
        ),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(10, 30),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 24),
    caching=st.booleans(),
)
def test_all_sequences_end_and_read_only_their_own_keys(
    requests: list[tuple[list[int], int, str, int]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    caching: bool,
) -> None:
    simulation = Simulation(
        make_scheduler(num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, caching=caching)
    )
    for prompt, num_output, salt, num_steps in requests:
        simulation.add(prompt, num_output, salt)
        for _ in range(num_steps):
            simulation.step()
    simulation.run()
    assert len(simulation.order_of_end) == len(requests)


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    simulation = Simulation(make_scheduler(max_num_batched_tokens=5))
    simulation.add([0] * 12, 1)
    assert [simulation.step()[0].num_tokens for _ in range(3)] == [5, 5, 2]


def test_decoding_sequences_come_before_prompts() -> None:
    simulation = Simulation(make_scheduler(max_num_batched_tokens=6))
    decoding = simulation.add([0], 5)
    simulation.step()
    prompt = simulation.add([1] * 20, 1)
    assert simulation.step() == [(decoding, 1), (prompt, 5)]


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    simulation = Simulation(make_scheduler())
    simulation.add([1] * 8, 1)
    simulation.run()
    again = simulation.add([1] * 8, 1)
    assert simulation.step() == [(again, 4)]
    assert again.num_cached_tokens == 4
    longer = simulation.add([1] * 9, 1)
    assert simulation.step() == [(longer, 1)]
    assert simulation.scheduler.num_prefix_hits == 12


def test_followers_wait_for_the_prompt_they_share() -> None:
    simulation = Simulation(make_scheduler(max_num_batched_tokens=6))
    leader = simulation.add([1] * 9, 4)
    follower = simulation.add([1] * 9, 3, leader=leader)
    other = simulation.add([2] * 9, 1)
    assert simulation.step() == [(leader, 6)]
    assert simulation.step() == [(leader, 3), (other, 3)]  # the follower does not hold up others
    assert simulation.step() == [(leader, 1), (other, 5)]
    assert simulation.step() == [(leader, 1), (other, 1), (follower, 1)]
    assert follower.blocks[:2] == leader.blocks[:2]
    simulation.run()


def test_the_last_admitted_is_preempted_and_keeps_its_tokens() -> None:
    simulation = Simulation(make_scheduler(num_blocks=6))
    first, last = simulation.add([0] * 7, 17), simulation.add([1] * 7, 16)
    while simulation.scheduler.num_preemptions == 0:
        simulation.step()
    assert first.state is State.RUNNING
    assert last.state is State.WAITING
    generated = list(last.token_ids)
    simulation.run()
    assert last.token_ids[: len(generated)] == generated
    assert simulation.order_of_end[0] is first


def test_a_preempted_sequence_comes_before_later_arrivals() -> None:
    simulation = Simulation(make_scheduler(num_blocks=6))
    first, last = simulation.add([0] * 7, 17), simulation.add([1] * 7, 16)
    simulation.step()
    simulation.add([2], 1)
    later = simulation.add([2] * 9, 1)
    while simulation.scheduler.num_preemptions == 0:
        simulation.step()
        if later.state is State.FINISHED:
            later = simulation.add([2] * 9, 1)
    assert first.state is State.RUNNING
    assert next(iter(simulation.scheduler.waiting)) is last


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    simulation = Simulation(make_scheduler(num_blocks=12, max_num_seqs=4))
    for _ in range(4):
        simulation.add([0] * 3, 6)
    large = simulation.add([1] * 40, 8)
    for _ in range(200):
        simulation.add([0] * 3, 6)
        simulation.step()
        if large.state is State.FINISHED:
            return
    pytest.fail("the large request did not end within 200 steps")


@pytest.mark.parametrize("moment", range(8))
def test_a_sequence_can_be_finished_at_any_moment(moment: int) -> None:
    simulation = Simulation(make_scheduler(num_blocks=6, max_num_batched_tokens=3))
    sequences = [simulation.add([index] * 7, 15) for index in range(3)]
    for _ in range(moment):
        simulation.step()
    simulation.scheduler.finish(sequences[moment % 3])
    simulation.scheduler.check()
    simulation.run()
    assert len(simulation.order_of_end) == 2
