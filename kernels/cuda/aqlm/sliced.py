"""The kernel for one token and large codebooks: slices of the entries in shared memory, codes sorted by slices."""

from __future__ import annotations

from ctypes import Structure, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.aqlm.packing import PackedAdditive
from aphroquant.kernels.cuda.aqlm.slices import GROUP_ROWS, MAX_CHUNK_GROUPS, SLICE_ENTRIES, WINDOW_ROWS, slice_codes
from aphroquant.kernels.cuda.launcher import cuda_kernel
from aphroquant.kernels.cuda.variants import Macro
from aphroquant.schemes import AdditiveScheme

SOURCE, ENTRY = "aqlm_sliced.cu", "aqlm_sliced"
IN_GROUP = 8
_MIN_CODE_BITS = 11  # smaller codebooks fit into shared memory whole
_MAX_ENTRIES = 1 << 17
_INPUT_BYTES = 128  # of a group of inputs, in 8 copies
_BARRIER_BYTES = 128
SLICED_BYTES = _BARRIER_BYTES + SLICE_ENTRIES * 16 + (MAX_CHUNK_GROUPS + 1) * _INPUT_BYTES  # of shared memory


class Problem(Structure):
    """As in aqlm_sliced.cu."""

    _fields_ = (
        ("rows", c_int32),
        ("groups", c_int32),
        ("chunks", c_int32),
        ("chunk_groups", c_int32),
        ("row_groups", c_int32),
        ("range_groups", c_int32),
        ("entries", c_int32),
        ("quads", c_void_p),
        ("offsets", c_void_p),
        ("row_numbers", c_void_p),
        ("books", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("input", c_void_p),
        ("output", c_void_p),
        ("partials", c_void_p),
        ("counters", c_void_p),
    )


@dataclass(frozen=True)
class SlicedPlan:
    """`ranges`: parts of the rows, each of which has a block for every unit."""

    ranges: int = 16
    warps: int = 16

    def range_groups(self, row_groups: int) -> int:
        """Whole windows of rows."""
        window = WINDOW_ROWS // GROUP_ROWS
        return -(-row_groups // (window * self.ranges)) * window

    def macros(self, dtype: torch.dtype) -> dict[str, Macro]:
        return {"ELEMENT_IS_BF16": int(dtype == torch.bfloat16), "WARPS": self.warps}


def can_be_sliced(scheme: AdditiveScheme) -> bool:
    """Whether the kernel runs a scheme, and gathering from L2 would be slower."""
    entries = scheme.num_codebooks * 2**scheme.code_bits
    return scheme.in_group == IN_GROUP and scheme.code_bits >= _MIN_CODE_BITS and entries <= _MAX_ENTRIES


class SlicedLinear:
    """y = x @ W.T + bias for one token. Not for two streams at once: blocks count each other."""

    def __init__(self, packed: PackedAdditive, codes: Tensor, bias: Tensor | None) -> None:
        """`codes` [N, groups, M] as the scheme has them."""
        scheme = packed.scheme
        self._packed, self._bias = packed, bias
        self._entries = scheme.num_codebooks * 2**scheme.code_bits
        first = torch.arange(scheme.num_codebooks, device=codes.device) * 2**scheme.code_bits
        self.codes = slice_codes(codes.long() + first, self._entries)
        windows = self.codes.row_numbers.shape[1] * GROUP_ROWS // WINDOW_ROWS
        self._counters = torch.zeros(windows, dtype=torch.int32, device=packed.codes.device)

    @property
    def units(self) -> int:
        """Blocks for each range of rows."""
        return self.codes.offsets.shape[0]

    def __call__(self, x: Tensor, out: Tensor, plan: SlicedPlan) -> None:
        """x [1, K] -> out [1, N]."""
        packed, sliced = self._packed, self.codes
        row_groups = sliced.row_numbers.shape[1]
        partials = torch.empty(self.units, row_groups * GROUP_ROWS, dtype=torch.float32, device=x.device)
        range_groups = plan.range_groups(row_groups)
        problem = Problem(
            packed.out_features,
            packed.num_groups,
            sliced.chunks,
            sliced.chunk_groups,
            row_groups,
            range_groups,
            self._entries,
            sliced.quads.data_ptr(),
            sliced.offsets.data_ptr(),
            sliced.row_numbers.data_ptr(),
            packed.codebooks.data_ptr(),
            packed.scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            partials.data_ptr(),
            self._counters.data_ptr(),
        )
        cuda_kernel(SOURCE, ENTRY, plan.macros(x.dtype)).launch(
            grid=(self.units, -(-row_groups // range_groups), 1),
            block=(plan.warps * 32, 1, 1),
            args=[problem],
            shared_bytes=SLICED_BYTES,
            programmatic=True,
        )
