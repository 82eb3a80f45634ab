"""The FP8 kernels, for checking their machine code and for compiling ahead."""

from __future__ import annotations

import torch

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
        KernelVariant("float8_quantize.cu", "float8_quantize", {"MODE": mode, "VECTOR": 8}, no_sass=("LDL", "STL"))
        for mode in range(3)
    ),
)
