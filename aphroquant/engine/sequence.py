"""One running sequence of tokens, as the scheduler and the batch see it."""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt

from aphroquant.engine.block_manager import Digest, root_digest


class State(Enum):
    """Where a sequence is: waiting -> running -> finished, and back to waiting when it is preempted."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Known tokens (the prompt and what was generated), how many of them are computed, and the blocks that hold those.

    Work is left while num_computed < len(token_ids): a prompt, a prompt's rest, the last sampled token, or everything
    anew after a preemption are one and the same to the scheduler.
    """

    def __init__(self, prompt: list[int], *, cache_salt: str = "", leader: Sequence | None = None) -> None:
        """`leader`: wait until the prompt of that sequence, equal to this one, is computed, and then share it."""
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.num_computed = 0
        self.num_cached_tokens = 0  # of the prompt, taken from the prefix cache when first admitted
        self.num_admissions = 0
        self.leader = leader
        self.state = State.WAITING
        self.blocks: list[int] = []
        self.block_table: npt.NDArray[np.int32] = np.zeros(8, np.int32)  # the same blocks, for the batch
        self.digests: list[Digest] = []  # of full blocks, made when they are needed
        self._root = root_digest(cache_salt)

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_ready(self) -> bool:
        """False while the leader still computes the prompt that this sequence will share."""
        leader = self.leader
        return leader is None or leader.state is State.FINISHED or leader.num_computed >= leader.num_prompt_tokens

    def previous_digest(self, block: int) -> Digest:
        """What the digest of the block with this index is chained to."""
        return self.digests[block - 1] if block else self._root

    def add_blocks(self, blocks: list[int]) -> None:
        """Append blocks, which this sequence holds from now on."""
        start, end = len(self.blocks), len(self.blocks) + len(blocks)
        if end > len(self.block_table):
            self.block_table = np.resize(self.block_table, max(end, 2 * len(self.block_table)))
        self.block_table[start:end] = blocks
        self.blocks += blocks

    def drop_blocks(self) -> list[int]:
        """The blocks, which this sequence no longer holds; everything has to be computed again."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = 0
        return blocks
