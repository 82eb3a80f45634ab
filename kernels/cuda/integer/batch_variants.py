"""The kernels for many tokens, of common kinds of weights, for checking their machine code and for compiling ahead."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.integer import mma, wgmma
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import PackedInteger, pack_groups
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.variants import KernelVariant, Macro

_HOPPER = ("sm_90a",)
_COLUMNS, _GROUP = 256, 128
_SMALL_SPILL = 64  # bytes, outside of the loops


def _packed(bits: int, dtype: torch.dtype) -> PackedInteger:
    codes = torch.zeros(64, _COLUMNS, dtype=torch.uint8)
    return pack_groups(bits, codes, torch.ones(64, _COLUMNS // _GROUP, dtype=dtype), _GROUP)


def _wgmma(macros: dict[str, Macro], tested: bool) -> KernelVariant:
    return KernelVariant(
        wgmma.SOURCE,
        wgmma.ENTRY,
        macros,
        _HOPPER,
        max_spill_bytes=_SMALL_SPILL,
        sass=("HGMMA", "UTMALDG", "UBLKCP", "ACQBULK"),
        tested=tested,
    )


def _mma(macros: dict[str, Macro], tested: bool) -> KernelVariant:
    sass = ("HMMA", "LDGSTS.128", "LDSM")
    return KernelVariant(mma.SOURCE, mma.ENTRY, macros, max_spill_bytes=_SMALL_SPILL, sass=sass, tested=tested)


_TILES = (
    WgmmaTile(16, warpgroups=1, stages=6),
    WgmmaTile(64, split=2),
    WgmmaTile(128, chunks=1, stages=5, split=2),
    WgmmaTile(256, chunks=1, stages=3, persistent=True),
)
BATCH_VARIANTS = (
    *(
        _wgmma(tile.macros(_packed(bits, torch.bfloat16), torch.bfloat16), bits == 4)
        for bits in (2, 3, 4, 8)
        for tile in _TILES
    ),
    *(_mma(MmaTile(64).macros(_packed(bits, torch.float16), torch.float16), bits == 4) for bits in (2, 3, 4, 8)),
    KernelVariant("gather_columns.cu", "gather_columns", no_sass=("LDL", "STL")),
)
