"""The compiled decoder equals the torch decoder, and a sequence's logits depend on nothing but the sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KV_FORMATS, KVCache, KVScheme
from aphroquant.engine.runner import ReferenceRunner
from aphroquant.kernels.cpu.decoder import NativeDecoder
from aphroquant.kernels.dispatch import ReferenceBackend
from aphroquant.models.spec import LINEARS
from aphroquant.schemes import IntegerScheme, QuantizedWeight

TinyCheckpoint = Callable[..., Path]

FLOAT_TOLERANCE = 1e-4  # logits of size 1 .. 10, float32 against float32
BLOCK_SIZE, NUM_BLOCKS = 16, 40

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 20},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}


class Quantized:
    """A dense checkpoint whose block linears are given in 4 bits."""

    def __init__(self, path: Path, bits: int = 4, group_size: int | None = 32) -> None:
        self._dense = open_checkpoint(path)
        self.spec, self.source = self._dense.spec, self._dense.source
        self._scheme = IntegerScheme(bits, group_size, symmetric=False)

    def __getattr__(self, name: str) -> object:
        return getattr(self._dense, name)

    def schemes(self) -> dict[str, object]:
        return {
            module: self._scheme if module.endswith(LINEARS) else scheme
            for module, scheme in self._dense.schemes().items()
        }

    def weight(self, module: str) -> QuantizedWeight:
        weight = self._dense.weight(module)
        if not module.endswith(LINEARS):
            return weight
        dense = weight.dequantize()
        n, k = weight.shape
        groups = dense.view(n, self._scheme.num_groups(k), -1)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        levels = 2**self._scheme.bits - 1
        scales = (high - low) / levels
        zeros = (-low / scales).round().clamp(0, levels)
        codes = (groups / scales + zeros).round().clamp(0, levels).to(torch.uint8).view(n, k)
        tensors = {"codes": codes, "scales": scales[..., 0], "zeros": zeros[..., 0].to(torch.uint8)}
        return QuantizedWeight(self._scheme, tensors, (n, k))


class Sequences:
    """Token ids of several sequences and where their blocks are, and batches of any pieces of them."""

    def __init__(self, lengths: list[int], vocab_size: int = 384) -> None:
        self.tokens = [torch.randint(0, vocab_size, (length,), dtype=torch.int32) for length in lengths]
        order, first = torch.randperm(NUM_BLOCKS), 0
        self.tables = []
        for length in lengths:
            count = -(-length // BLOCK_SIZE)
            self.tables.append(order[first : first + count])
            first += count

    def batch(self, pieces: list[tuple[int, int, int]], *, all_logits: bool = True) -> ForwardBatch:
        """Pieces (sequence, start, end)."""
        starts = torch.tensor([0, *(end - start for _, start, end in pieces)]).cumsum(0)
        tables = torch.zeros(len(pieces), max(len(self.tables[s]) for s, _, _ in pieces), dtype=torch.int32)
        for row, (sequence, _, _) in enumerate(pieces):
            tables[row, : len(self.tables[sequence])] = self.tables[sequence]
        positions = torch.cat([torch.arange(start, end) for _, start, end in pieces])
        slots = [
            self.tables[s][torch.arange(start, end) // BLOCK_SIZE] * BLOCK_SIZE + torch.arange(start, end) % BLOCK_SIZE
            for s, start, end in pieces
        ]
        rows = torch.arange(int(starts[-1])) if all_logits else starts[1:] - 1
        return ForwardBatch(
            token_ids=torch.cat([self.tokens[s][start:end] for s, start, end in pieces]),
            positions=positions.int(),
            slot_mapping=torch.cat(slots),
            query_start=starts.int(),
            context_lens=torch.tensor([end for _, _, end in pieces], dtype=torch.int32),
            block_tables=tables,
            logits_rows=rows.int(),
        )


def new_cache(checkpoint: object, name: str = "float32") -> KVCache:
    return KVCache(checkpoint.spec, KVScheme.named(name), NUM_BLOCKS, BLOCK_SIZE)  # type: ignore[attr-defined]


def run(
    checkpoint: object, batches: list[ForwardBatch], *, kv: str = "float32", activations: str = "int8", threads: int = 2
) -> list[Tensor]:
    decoder = NativeDecoder(checkpoint, new_cache(checkpoint, kv), activations=activations, num_threads=threads)  # type: ignore[arg-type]
    return [decoder.forward(batch) for batch in batches]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_torch_decoder(instruction_set: str, tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    path = tiny_checkpoint(family, **FAMILIES[family])
    sequences = Sequences([45, 30])
    batches = [sequences.batch([(0, 0, 33), (1, 0, 30)]), sequences.batch([(0, 33, 45)])]
    for checkpoint in (open_checkpoint(path), Quantized(path)):
        reference = ReferenceRunner(checkpoint, new_cache(checkpoint), ReferenceBackend("test"))  # type: ignore[arg-type]
        found = run(checkpoint, batches, activations="float")
        for batch, logits in zip(batches, found, strict=True):
            expected = reference.forward(batch)
            assert (logits - expected).abs().max() < FLOAT_TOLERANCE
            assert expected.abs().max() > 1  # else the tolerance would mean nothing


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_every_cache_format_gives_the_torch_decoders_logits(
    compiled: None, tiny_checkpoint: TinyCheckpoint, kv: str
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    sequences = Sequences([45])
    batches = [sequences.batch([(0, 0, 40)]), *(sequences.batch([(0, i, i + 1)]) for i in range(40, 45))]
    reference = ReferenceRunner(checkpoint, new_cache(checkpoint, kv), ReferenceBackend("test"))
    found = run(checkpoint, batches, kv=kv, activations="float")
    # A last bit of difference before rounding can become a step of the cache's format: the bulk must agree.
    errors = torch.cat([(a - reference.forward(b)).abs().amax(1) for a, b in zip(found, batches, strict=True)])
    assert errors.median() < FLOAT_TOLERANCE if kv == "float32" else errors.median() < 1e-2


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("kv", ["float32", "fp8_e4m3"])
def test_chunks_batches_and_threads_change_no_bit(
    instruction_set: str, tiny_checkpoint: TinyCheckpoint, activations: str, kv: str
) -> None:
    checkpoint = Quantized(tiny_checkpoint("llama"))
    sequences = Sequences([290, 70, 5])
    (alone,) = run(checkpoint, [sequences.batch([(0, 0, 290)])], kv=kv, activations=activations)
    mixed = [
        sequences.batch([(1, 0, 64), (0, 0, 40)]),
        sequences.batch([(0, 40, 41), (1, 64, 65), (2, 0, 5)]),
        sequences.batch([(0, 41, 288)]),
        sequences.batch([(1, 65, 70), (0, 288, 290)]),
    ]
    for threads in (1, 2, 3):
        found = run(checkpoint, mixed, kv=kv, activations=activations, threads=threads)
        pieces = [found[0][64:], found[1][:1], found[2], found[3][5:]]
        assert torch.equal(torch.cat(pieces), alone)


def test_only_the_wanted_rows_get_logits(compiled: None, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    sequences = Sequences([20, 9])
    pieces = [(0, 0, 20), (1, 0, 9)]
    every, last = sequences.batch(pieces), sequences.batch(pieces, all_logits=False)
    none = replace(last, logits_rows=torch.empty(0, dtype=torch.int32))
    all_rows, last_rows, no_rows = run(checkpoint, [every, last, none])
    assert torch.equal(last_rows, all_rows[[19, 28]])
    assert no_rows.shape == (0, 384)


def test_quantized_inputs_stay_near_the_exact_forward(instruction_set: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Quantized(tiny_checkpoint("llama"))
    batch = Sequences([60]).batch([(0, 0, 60)])
    exact, fast = (run(checkpoint, [batch], activations=mode)[0] for mode in ("float", "int8"))
    assert (exact - fast).norm() / exact.norm() < 0.03
    assert not torch.equal(exact, fast)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_ids", torch.tensor([0, 1, 384], dtype=torch.int32), r"token_ids holds 0 .. 384"),
        ("token_ids", torch.tensor([0, 1, -1], dtype=torch.int32), r"token_ids holds -1 .. 1"),
        ("token_ids", torch.tensor([0, 1, 2]), r"token_ids must be contiguous torch.int32 \[3\]"),
        ("positions", torch.tensor([0, 1, -5], dtype=torch.int32), "positions holds"),
        ("positions", torch.tensor([0, 1], dtype=torch.int32), "positions must be"),
        ("slot_mapping", torch.tensor([0, 1, NUM_BLOCKS * BLOCK_SIZE]), "slot_mapping holds"),
        ("query_start", torch.tensor([0, 2], dtype=torch.int32), "query_start must ascend from 0 to 3"),
        ("query_start", torch.tensor([0, 3, 3], dtype=torch.int32), "query_start must be"),
        ("context_lens", torch.tensor([2], dtype=torch.int32), "context_lens must cover"),
        ("context_lens", torch.tensor([17], dtype=torch.int32), "fit into block_tables"),
        ("block_tables", torch.tensor([[NUM_BLOCKS]], dtype=torch.int32), "block_tables holds"),
        ("block_tables", torch.tensor([0], dtype=torch.int32), "block_tables must be"),
        ("logits_rows", torch.tensor([3], dtype=torch.int32), "logits_rows holds"),
    ],
)
def test_a_batch_that_points_outside_memory_is_refused(
    compiled: None, tiny_checkpoint: TinyCheckpoint, field: str, value: Tensor, message: str
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    batch = replace(Sequences([3]).batch([(0, 0, 3)]), **{field: value})
    with pytest.raises(ValueError, match=message):
        run(checkpoint, [batch])


def test_positions_beyond_the_first_table_are_rotated(compiled: None, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    batch = Sequences([3]).batch([(0, 0, 3)])
    far = replace(batch, positions=batch.positions + 100_000)
    reference = ReferenceRunner(checkpoint, new_cache(checkpoint), ReferenceBackend("test"))
    (found,) = run(checkpoint, [far], activations="float")
    assert (found - reference.forward(far)).abs().max() < FLOAT_TOLERANCE
