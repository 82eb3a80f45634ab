"""The grouped kernels, for checking their machine code and for compiling ahead."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.float8 import wgmma as float8
from aphroquant.kernels.cuda.float8.wgmma import Float8Tile
from aphroquant.kernels.cuda.grouped.multiply import GROUPED
from aphroquant.kernels.cuda.grouped.plans import decode_plan
from aphroquant.kernels.cuda.grouped.routing import TILE_SIZES
from aphroquant.kernels.cuda.integer import decode, mma, wgmma
from aphroquant.kernels.cuda.integer.decode_plan import TOKENS_OF_TILE, DecodeShape, decode_macros
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import pack_groups
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.variants import KernelVariant

_DTYPE = torch.bfloat16
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_89": 100 << 10, "sm_90a": 228 << 10}
_SMALL_SPILL = 64  # bytes, outside of the loops
_LAYERS = ((1536, 2048), (2048, 768))  # of an expert of Qwen3-30B-A3B
_HOPPER = ("sm_90a",)
_PACKED = pack_groups(4, torch.zeros(64, 256, dtype=torch.uint8), torch.ones(64, 2, dtype=_DTYPE), 128)


def _decode(layer: tuple[int, int], size: int, architecture: str, tested: bool = False) -> KernelVariant:
    n, k = layer
    shape = DecodeShape(4, 128, 0, _DTYPE, n, k, k, False, False, _DTYPE)
    macros = decode_macros(shape, decode_plan(shape, size, _SHARED_BYTES[architecture]), size // TOKENS_OF_TILE)
    copies = "UBLKCP" if architecture == "sm_90a" else "LDGSTS.128"
    sass = ("HMMA", "LDSM", copies)
    return KernelVariant(decode.SOURCE, decode.ENTRY, macros | GROUPED, (architecture,), _SMALL_SPILL, sass, (), tested)


def _wgmma(tile: WgmmaTile) -> KernelVariant:
    macros = tile.macros(_PACKED, _DTYPE) | GROUPED
    return KernelVariant(wgmma.SOURCE, wgmma.ENTRY, macros, _HOPPER, _SMALL_SPILL, ("HGMMA", "UTMALDG", "UBLKCP"))


def _float8(tile: Float8Tile, block_rows: int | None) -> KernelVariant:
    macros = tile.macros(_DTYPE, block_rows) | GROUPED
    return KernelVariant(float8.SOURCE, float8.ENTRY, macros, _HOPPER, _SMALL_SPILL, ("QGMMA", "UTMALDG"))


VARIANTS = (
    KernelVariant(
        "grouped_route.cu", "grouped_route", {"ID_BYTES": 8, "NUM_SIZES": len(TILE_SIZES)}, no_sass=("LDL", "STL")
    ),
    KernelVariant("grouped_route.cu", "grouped_route", {"BLOCKS": 32, "ID_BYTES": 4}, no_sass=("LDL", "STL")),
    KernelVariant("grouped_choose.cu", "grouped_choose", no_sass=("LDL", "STL")),
    KernelVariant("grouped_combine.cu", "grouped_combine", {"TOP_K": 8}, sass=("LDG.128",), no_sass=("LDL", "STL")),
    KernelVariant("grouped_gather.cu", "grouped_gather", sass=("LDG.128",), no_sass=("LDL", "STL")),
    KernelVariant("grouped_quantize.cu", "grouped_quantize", no_sass=("LDL", "STL")),
    *(_decode(layer, 8, "sm_90a", tested=True) for layer in _LAYERS),
    _decode(_LAYERS[0], 16, "sm_90a"),
    *(_decode(_LAYERS[0], 8, architecture) for architecture in ("sm_80", "sm_89")),
    _wgmma(WgmmaTile(64, stages=5, persistent=True)),
    _wgmma(WgmmaTile(256, chunks=1, stages=3, persistent=True)),
    KernelVariant(mma.SOURCE, mma.ENTRY, MmaTile(64).macros(_PACKED, _DTYPE) | GROUPED, sass=("HMMA", "LDGSTS.128")),
    _float8(Float8Tile(64, stages=6, persistent=True), None),
    _float8(Float8Tile(128, stages=4, persistent=True), 128),
)
