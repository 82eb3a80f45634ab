"""The kernel for one token and 8-bit codes: tables of dot products in shared memory."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.aqlm.packing import TILE_ROWS, PackedAdditive
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.schemes import AdditiveScheme

SOURCE, ENTRY = "aqlm_lookup.cu", "aqlm_lookup"
ENTRIES = 256
IN_GROUP = 8
TABLE_BYTES = 128 * ENTRIES * 4  # of shared memory


class Problem(Structure):
    """As in aqlm_lookup.cu."""

    _fields_ = (
        ("rows", c_int32),
        ("groups", c_int32),
        ("slices", c_int32),
        ("row_tiles", c_int32),
        ("range_batches", c_int32),
        ("codes", c_void_p),
        ("entries", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("output", c_void_p),
        ("partials", c_void_p),
        ("counters", c_void_p),
    )


@dataclass(frozen=True)
class LookupPlan:
    """`ranges`: parts of the rows, each of which has a block for every slice."""

    ranges: int = 16
    warps: int = 16
    batch: int = 4  # row quads that a warp looks up at once

    def range_batches(self, row_tiles: int) -> int:
        return -(-row_tiles * TILE_ROWS // (self.batch * 4 * self.ranges))

    def macros(self, dtype: torch.dtype, num_codebooks: int) -> dict[str, Macro]:
        return {
            "ELEMENT_IS_BF16": int(dtype == torch.bfloat16),
            "CODEBOOKS": num_codebooks,
            "CODE_BYTES": 1,
            "WARPS": self.warps,
            "BATCH": self.batch,
        }


def has_tables(scheme: AdditiveScheme) -> bool:
    """Whether the kernel's tables hold a codebook of that scheme."""
    return scheme.code_bits <= 8 and scheme.num_codebooks <= 2 and scheme.in_group == IN_GROUP


def entry_fragments(packed: PackedAdditive) -> Tensor:
    """The entries as the matrix instructions take them: [M, 32 tiles, lane (code, pair), value and rest] pairs."""
    books = torch.stack([packed.codebooks, packed.remainders], -2)  # [M, entries, 2, 8]
    padded = torch.nn.functional.pad(books, (0, 0, 0, 0, 0, ENTRIES - books.shape[1]))
    pairs = padded.view(books.shape[0], ENTRIES // 8, 8, 2, 4, 2)
    return pairs.transpose(3, 4).contiguous()


class LookupLinear:
    """y = x @ W.T + bias for one token. Not for two streams at once: blocks count each other."""

    def __init__(self, packed: PackedAdditive, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._packed, self._bias, self._dtype = packed, bias, dtype
        self._entries = entry_fragments(packed)
        self._counters = torch.zeros(packed.codes.shape[1] * 2, dtype=torch.int32, device=packed.codes.device)

    def __call__(self, x: Tensor, out: Tensor, plan: LookupPlan) -> None:
        """x [1, K] -> out [1, N]."""
        packed = self._packed
        slices, row_tiles = packed.codes.shape[:2]
        partials = torch.empty(slices, row_tiles * TILE_ROWS, dtype=torch.float32, device=x.device)
        batches = plan.range_batches(row_tiles)
        problem = Problem(
            packed.out_features,
            packed.num_groups,
            slices,
            row_tiles,
            batches,
            packed.codes.data_ptr(),
            self._entries.data_ptr(),
            packed.scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            partials.data_ptr(),
            self._counters.data_ptr(),
        )
        kernel = cuda_kernel(SOURCE, ENTRY, plan.macros(self._dtype, packed.scheme.num_codebooks))
        kernel.launch(
            grid=(slices, -(-row_tiles * TILE_ROWS // (batches * plan.batch * 4)), 1),
            block=(plan.warps * 32, 1, 1),
            args=[problem],
            shared_bytes=TABLE_BYTES,
            programmatic=True,
        )
