"""The AQLM kernels for the usual codebooks, for checking their machine code and for compiling ahead."""

from __future__ import annotations

from aphroquant.kernels.cuda.variants import KernelVariant, Macro

_2X8: dict[str, Macro] = {"CODEBOOKS": 2, "CODE_BYTES": 1, "CODE_BITS": 8, "IN_GROUP": 8}
_1X16: dict[str, Macro] = {"CODEBOOKS": 1, "CODE_BYTES": 2, "CODE_BITS": 16, "IN_GROUP": 8}
_LOCAL = ("LDL", "STL")


def _lookup(warps: int, batch: int, tested: bool) -> KernelVariant:
    macros = {"ELEMENT_IS_BF16": 1, "CODEBOOKS": 2, "CODE_BYTES": 1, "WARPS": warps, "BATCH": batch}
    sass = ("HMMA", "LDS", "LDG.128")
    return KernelVariant("aqlm_lookup.cu", "aqlm_lookup", macros, sass=sass, no_sass=_LOCAL, tested=tested)


def _sliced(warps: int, tested: bool) -> KernelVariant:
    macros: dict[str, Macro] = {"ELEMENT_IS_BF16": 1, "WARPS": warps}
    sass = ("HMMA", "LDSM", "UBLKCP")
    return KernelVariant("aqlm_sliced.cu", "aqlm_sliced", macros, ("sm_90a",), sass=sass, no_sass=_LOCAL, tested=tested)


def _gather(scheme: dict[str, Macro], token_tiles: int, copies: int, tested: bool) -> KernelVariant:
    warps = 8 if token_tiles >= 4 else 16
    settings = {"TOKEN_TILES": token_tiles, "COPIES": copies, "HOT": 0, "WARPS": warps, "BLOCKS": 1}
    sass = ("HMMA", "LDG.128", "LDS.128") if copies else ("HMMA", "LDG.128")
    macros = {"ELEMENT_IS_BF16": 1, **scheme, **settings}
    return KernelVariant("aqlm_gather.cu", "aqlm_gather", macros, sass=sass, no_sass=_LOCAL, tested=tested)


def _dequantize(scheme: dict[str, Macro], copies: int) -> KernelVariant:
    macros = {"ELEMENT_IS_BF16": 1, **scheme, "COPIES": copies, "BLOCKS": 3}
    return KernelVariant("aqlm_dequantize.cu", "aqlm_dequantize", macros, sass=("LDG.128", "STG"), no_sass=_LOCAL)


VARIANTS = (
    _lookup(16, 4, tested=True),
    _lookup(24, 4, tested=False),
    _sliced(16, tested=True),
    _sliced(24, tested=False),
    *(_gather(_2X8, tiles, 8, tested=tiles == 1) for tiles in (1, 2, 4, 8)),
    *(_gather(_1X16, tiles, 0, tested=tiles == 1) for tiles in (1, 2, 4, 8)),
    _dequantize(_2X8, 8),
    _dequantize(_1X16, 0),
)
