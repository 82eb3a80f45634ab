"""The mma.sync kernel for many tokens, which runs on every GPU since Ampere: its tiles, and its launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aphroquant.kernels.cuda.integer.packing import CHUNK, PackedInteger
from aphroquant.kernels.cuda.integer.problem import PackedWeights, packed_macros, super_row_bytes
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

SOURCE, ENTRY, SUM_ENTRY = "integer_mma.cu", "integer_mma", "integer_mma_sum"
ROWS = 128  # of a block
_SUPER_ROWS = 2
_THREADS, _SUM_THREADS = 128, 256


@dataclass(frozen=True)
class MmaTile:
    """A block multiplies 128 rows of the weight with `tokens`; `split` blocks share the columns."""

    tokens: int
    stages: int = 4
    split: int = 1

    def macros(self, packed: PackedInteger, dtype: torch.dtype) -> dict[str, Macro]:
        tile: dict[str, Macro] = {"TOKENS": self.tokens, "STAGES": self.stages, "SPLIT": self.split}
        return packed_macros(packed, dtype, 1) | tile

    def shared_bytes(self, packed: PackedInteger) -> int:
        stages = self.stages * (self.tokens * CHUNK * 2 + _SUPER_ROWS * super_row_bytes(packed, 1))
        return max(stages, self.tokens * (ROWS + 8) * 2)


class Problem(ctypes.Structure):
    """As in integer_mma.cu."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("chunks", c_int32),
        ("width", c_int32),
        ("weights", PackedWeights),
        ("input", c_void_p),
        ("bias", c_void_p),
        ("output", c_void_p),
        ("partials", c_void_p),
    )


def mma_multiply(
    packed: PackedInteger, x: Tensor, bias: Tensor | None, tile: MmaTile, exponent: int = 0, out: Tensor | None = None
) -> Tensor:
    """x [T, columns in packed order] -> [T, N]; columns that x lacks are 0. `exponent`: of `scale_exponent`.

    The rows of x are contiguous and their length a multiple of 8; bias is float32.
    """
    tokens, rows = x.shape[0], packed.out_features
    if out is None:
        out = x.new_empty(tokens, rows)
    split = tile.split > 1
    partials = torch.empty(tile.split, tokens, rows, dtype=torch.float32, device=x.device) if split else None
    problem = Problem(
        rows,
        tokens,
        packed.padded_columns // CHUNK,
        x.shape[1],
        PackedWeights.of(packed, exponent, x.dtype),
        x.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        0 if partials is None else partials.data_ptr(),
    )
    macros = tile.macros(packed, x.dtype)
    cuda_kernel(SOURCE, ENTRY, macros).launch(
        grid=(-(-rows // ROWS), -(-tokens // tile.tokens), tile.split),
        block=(_THREADS, 1, 1),
        args=[problem],
        shared_bytes=tile.shared_bytes(packed),
        programmatic=True,
    )
    if split:
        cuda_kernel(SOURCE, SUM_ENTRY, macros).launch(
            grid=(-(-rows // _SUM_THREADS), tokens, 1), block=(_SUM_THREADS, 1, 1), args=[problem], programmatic=True
        )
    return out
