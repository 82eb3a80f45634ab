"""The wgmma kernel of Hopper GPUs for many tokens: its tiles, and its launch."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_float, c_int32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.packing import CHUNK, ROWS, PackedInteger, chunk_bytes
from aphroquant.kernels.cuda.launcher import TensorMap, cuda_kernel
from aphroquant.kernels.cuda.variants import Macro

SOURCE, ENTRY = "integer_wgmma.cu", "integer_wgmma"
_SCALE_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@dataclass(frozen=True)
class WgmmaTile:
    """How the kernel cuts a product: a block multiplies warpgroups * tiles * 64 rows of the weight with `tokens`.

    `split` blocks share the columns of a tile, `multicast` blocks their tokens; `persistent` ones take tile after tile.
    """

    tokens: int
    warpgroups: int = 2
    tiles: int = 1
    chunks: int = 2
    stages: int = 4
    steps: int = 1
    split: int = 1
    multicast: int = 1
    persistent: bool = False
    blocks: int = 1

    @property
    def rows(self) -> int:
        return self.warpgroups * self.tiles * ROWS

    @property
    def cluster(self) -> int:
        return self.split * self.multicast

    def macros(self, packed: PackedInteger, dtype: torch.dtype) -> dict[str, Macro]:
        return {
            "CODE_BITS": packed.bits,
            "GROUP": group_macro(packed),
            "ZEROS": zero_kind(packed),
            "BFLOAT": dtype == torch.bfloat16,
            "SCALE_TYPE": _SCALE_TYPES[packed.scales.dtype],
            "WARPGROUPS": self.warpgroups,
            "TILES": self.tiles,
            "TOKENS": self.tokens,
            "CHUNKS": self.chunks,
            "STAGES": self.stages,
            "STEPS": self.steps,
            "SPLIT": self.split,
            "MULTICAST": self.multicast,
            "PERSISTENT": self.persistent,
            "BLOCKS": self.blocks,
        }

    def stage_bytes(self, packed: PackedInteger) -> int:
        size = packed.scales.element_size()
        group = group_macro(packed)
        groups = 0 if group == 0 else max(1, self.chunks * CHUNK // group)
        values = groups * ROWS * (size + (0, 1, size)[zero_kind(packed)])
        weights = self.warpgroups * self.tiles * (self.chunks * chunk_bytes(packed.bits) + values)
        return self.chunks * self.tokens * CHUNK * 2 + weights

    def shared_bytes(self, packed: PackedInteger) -> int:
        """As the kernel computes it."""
        stages = self.stages * self.stage_bytes(packed)
        if self.split > 1:
            output = self.tokens * (self.rows + 4) * 4
        else:
            output = self.warpgroups * self.tokens * (self.tiles * ROWS + 8) * 2
        payload = _up(stages, 128) + output if self.persistent else max(stages, output)
        return _up(payload, 8) + self.stages * 16 + 1024


class _Problem(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32),
        ("tokens", c_int32),
        ("steps", c_int32),
        ("row_tiles", c_int32),
        ("token_tiles", c_int32),
        ("groups", c_int32),
        ("scale_factor", c_float),
        ("output_factor", c_float),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("offsets", c_void_p),
        ("values", c_void_p),
        ("bias", c_void_p),
    )


def zero_kind(packed: PackedInteger) -> int:
    """0: the zero point is in the middle; 1: zero points; 2: offsets."""
    return 1 if packed.zeros is not None else 2 if packed.offsets is not None else 0


def group_macro(packed: PackedInteger) -> int:
    """The group size as the kernel takes it: 0 where a row's only scale can multiply its sums."""
    return 0 if zero_kind(packed) == 0 and packed.group_size == packed.padded_columns else packed.group_size


def scale_exponent(packed: PackedInteger, dtype: torch.dtype) -> int:
    """The power of two that brings the largest scale near 1, where fp16 has to hold scales of another type."""
    if dtype != torch.float16 or packed.scales.dtype == torch.float16 or group_macro(packed) == 0:
        return 0
    largest = max(float(part.abs().max()) for part in (packed.scales, packed.offsets) if part is not None)
    return -math.frexp(largest)[1] if math.isfinite(largest) and largest > 0 else 0


def wgmma_multiply(
    packed: PackedInteger, x: Tensor, bias: Tensor | None, tile: WgmmaTile, exponent: int = 0, out: Tensor | None = None
) -> Tensor:
    """x [T, >= packed columns or in_features] in packed column order -> [T, N]. `exponent`: of `scale_exponent`.

    The rows of x must begin at multiples of 16 bytes; bias is float32.
    """
    tokens = x.shape[0]
    if out is None:
        out = x.new_empty(tokens, packed.out_features)
    row_tiles, token_tiles = -(-packed.out_features // tile.rows), -(-tokens // tile.tokens)
    problem = _Problem(
        packed.out_features,
        tokens,
        packed.padded_columns // (CHUNK * tile.chunks),
        row_tiles,
        token_tiles,
        packed.scales.shape[1],
        2.0**exponent,
        2.0**-exponent,
        packed.codes.data_ptr(),
        packed.scales.data_ptr(),
        0 if packed.zeros is None else packed.zeros.data_ptr(),
        0 if packed.offsets is None else packed.offsets.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )
    clusters = -(-row_tiles // tile.multicast) * token_tiles
    if tile.persistent:
        clusters = min(clusters, gpu(x.get_device()).multiprocessors * tile.blocks // tile.cluster)
    inputs = TensorMap.of(x, (tile.tokens // tile.multicast, CHUNK), swizzle=128)
    kernel = cuda_kernel(SOURCE, ENTRY, tile.macros(packed, x.dtype))
    kernel.launch(
        grid=(clusters * tile.cluster, 1, 1),
        block=((tile.warpgroups + 1) * 128, 1, 1),
        args=[inputs, problem],
        shared_bytes=tile.shared_bytes(packed),
        cluster=(tile.cluster, 1, 1) if tile.cluster > 1 else None,
        programmatic=True,
    )
    return out


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
