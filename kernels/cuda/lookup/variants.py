"""The kernels for lookup weights and super-blocks of common models, for checking their machine code."""

from __future__ import annotations

import torch

from aphroquant.kernels.cuda.integer import mma, wgmma
from aphroquant.kernels.cuda.integer.decode import ENTRY, SOURCE
from aphroquant.kernels.cuda.integer.decode_plan import TOKENS_OF_TILE as TILE
from aphroquant.kernels.cuda.integer.decode_plan import DecodeShape, ceil_div, choose_plan, decode_macros
from aphroquant.kernels.cuda.integer.mma import MmaTile
from aphroquant.kernels.cuda.integer.packing import ROWS, PackedInteger
from aphroquant.kernels.cuda.integer.wgmma import WgmmaTile
from aphroquant.kernels.cuda.lookup.linear import pack_any
from aphroquant.kernels.cuda.variants import KernelVariant
from aphroquant.kernels.random_weights import random_weight
from aphroquant.schemes import KQuantScheme, LookupScheme, Scheme

_SMALL_SPILL = 96  # bytes, outside of the loops
_MULTIPROCESSORS, _CAPABILITY = 132, (9, 0)
_COLUMNS = 256
_LAYER = (4096, 4096)
_FEW, _MORE = 1, 16  # tokens
_DTYPE = torch.bfloat16
_NF4 = LookupScheme("nf4", 64, "float")
_SCHEMES: dict[str, Scheme] = {
    "nf4": _NF4,
    "mxfp4": LookupScheme("e2m1", 32, "e8m0"),
    "nvfp4": LookupScheme("e2m1", 16, "e4m3"),
    "q4_k": KQuantScheme("q4_k"),
    "q6_k": KQuantScheme("q6_k"),
}
_TILES = (WgmmaTile(64, split=2), WgmmaTile(256, chunks=1, stages=3, persistent=True))


def _packed(scheme: Scheme) -> PackedInteger:
    return pack_any(random_weight(scheme, ROWS, _COLUMNS), "cpu")


def _decode(scheme: Scheme, tokens: int) -> KernelVariant:
    n, k = _LAYER
    small = DecodeShape.of(_packed(scheme), _DTYPE, False)
    shape = DecodeShape(**(vars(small) | {"out_features": n, "in_features": k, "padded_columns": k}))
    plan = choose_plan(shape, tokens, _MULTIPROCESSORS, _CAPABILITY)
    macros = decode_macros(shape, plan, ceil_div(tokens, TILE))
    tested = tokens == _FEW
    return KernelVariant(
        SOURCE, ENTRY, macros, ("sm_90a",), _SMALL_SPILL, ("HMMA", "LDSM", "UBLKCP"), tested=tested, prebuilt=False
    )


def _wgmma(scheme: Scheme, tile: WgmmaTile) -> KernelVariant:
    macros = tile.macros(_packed(scheme), _DTYPE)
    return KernelVariant(
        wgmma.SOURCE, wgmma.ENTRY, macros, ("sm_90a",), _SMALL_SPILL, ("HGMMA", "UTMALDG"), tested=False, prebuilt=False
    )


def _mma(scheme: Scheme) -> KernelVariant:
    macros = MmaTile(64).macros(_packed(scheme), _DTYPE)
    return KernelVariant(
        mma.SOURCE, mma.ENTRY, macros, max_spill_bytes=_SMALL_SPILL, sass=("HMMA", "LDSM"), tested=False, prebuilt=False
    )


VARIANTS = (
    *(_decode(scheme, tokens) for scheme in _SCHEMES.values() for tokens in (_FEW, _MORE)),
    *(_wgmma(scheme, tile) for scheme in _SCHEMES.values() for tile in _TILES),
    *(_mma(scheme) for scheme in _SCHEMES.values()),
)
