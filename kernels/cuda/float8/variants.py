"""The FP8 kernels, for checking their machine code and for compiling ahead."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.float8.quantize import Granularity, quantize_macros
from aphroquant.kernels.cuda.float8.wgmma import ENTRY, SOURCE, Float8Tile
from aphroquant.kernels.cuda.variants import KernelVariant

_TILES = (
    Float8Tile(16, stages=6, split=2),
    Float8Tile(64, stages=6),
    Float8Tile(128, stages=5, persistent=True),
    Float8Tile(256, stages=3, persistent=True),
)


def _multiply(tile: Float8Tile, block_rows: int | None) -> KernelVariant:
    macros = tile.macros(torch.bfloat16, block_rows)
    return KernelVariant(SOURCE, ENTRY, macros, ("sm_90a",), max_spill_bytes=64, sass=("QGMMA", "UTMALDG", "ACQBULK"))


VARIANTS = (
    *(_multiply(tile, None) for tile in _TILES),
    *(_multiply(tile, 128) for tile in _TILES[:3]),
    *(
        KernelVariant(
            "float8_quantize.cu",
            "float8_quantize",
            quantize_macros(torch.bfloat16, granularity, columns),
            no_sass=("LDL", "STL"),
        )
        for granularity, columns in ((*((kind, 4096) for kind in Granularity), (Granularity.TOKEN, 28672)))
    ),
)
