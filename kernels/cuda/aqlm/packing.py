"""AQLM weights in the order that the kernels of this folder read: source/aqlm_elements.cuh says how codes lie.

Codebooks are kept in the dtype of the inputs, scaled by a power of two to at most 1, which the rows' scales undo.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.schemes import AdditiveScheme, QuantizedWeight

TILE_ROWS = 32
LANES = 32
_ROW_QUADS = TILE_ROWS // 4


@dataclass(frozen=True)
class CodeLayout:
    """Which code is where: tables T = k * 32 + l of a slice stand for group T % groups and codebook T // groups."""

    num_codebooks: int
    code_bytes: int

    @classmethod
    def of(cls, scheme: AdditiveScheme) -> CodeLayout:
        return cls(scheme.num_codebooks, 1 if scheme.code_bits <= 8 else 2 if scheme.code_bits <= 16 else 4)

    @property
    def tables(self) -> int:
        """Codes of a row in a slice."""
        return LANES * 4 // self.code_bytes

    @property
    def groups(self) -> int:
        """Input groups in a slice; 0 if a group has more codes than a slice holds."""
        return self.tables // (1 << (self.num_codebooks - 1).bit_length())

    def slices(self, num_groups: int) -> int:
        return -(-num_groups // self.groups)


@dataclass(frozen=True)
class PackedAdditive:
    """A weight [out_features, in_features] = scales * sums of codebook vectors."""

    scheme: AdditiveScheme
    layout: CodeLayout
    out_features: int
    in_features: int
    codes: Tensor  # uint8 [slices, row tiles, 8 row quads, 32 lanes, 4 rows, 4 bytes]
    codebooks: Tensor  # [M, entries, in_group] in the inputs' dtype, of magnitude at most 1
    remainders: Tensor  # as codebooks: what rounding them to that dtype left out
    scales: Tensor  # float32 [out_features]

    @property
    def num_groups(self) -> int:
        return self.in_features // self.scheme.in_group

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.codes, self.codebooks, self.remainders, self.scales))


def pack_additive(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device | str | None) -> PackedAdditive:
    """The weight of an AdditiveScheme with out_group 1, for inputs of `dtype`, on `device`."""
    scheme = weight.scheme
    assert isinstance(scheme, AdditiveScheme) and scheme.out_group == 1
    layout = CodeLayout.of(scheme)
    books = weight["codebooks"].to(device, torch.float32).squeeze(2)  # [M, entries, in_group]
    exponent = _exponent(books)
    books = torch.ldexp(books, -exponent)
    rounded = books.to(dtype)
    return PackedAdditive(
        scheme=scheme,
        layout=layout,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        codes=pack_codes(weight["codes"].to(device), layout),
        codebooks=rounded.contiguous(),
        remainders=(books - rounded.float()).to(dtype).contiguous(),
        scales=torch.ldexp(weight["scales"].to(device, torch.float32), exponent).contiguous(),
    )


def _exponent(books: Tensor) -> Tensor:
    """Of the power of two above the largest magnitude; 0 where there is none."""
    largest = books.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    return torch.where(largest > 0, torch.frexp(largest).exponent, 0)


def pack_codes(codes: Tensor, layout: CodeLayout) -> Tensor:
    """Unsigned codes [N, groups, M] in the kernels' order; padding holds code 0."""
    rows, groups, books = codes.shape
    slices, tiles = layout.slices(groups), -(-rows // TILE_ROWS)
    held = layout.tables // layout.groups
    padded = torch.zeros(
        tiles * TILE_ROWS, slices * layout.groups, held, dtype=_dtype(layout.code_bytes), device=codes.device
    )
    padded[:rows, :groups, :books] = codes.to(padded.dtype)
    by_table = padded.view(tiles, _ROW_QUADS, 4, slices, layout.groups, held).transpose(-1, -2)
    words = by_table.reshape(tiles, _ROW_QUADS, 4, slices, layout.tables // LANES, LANES)
    ordered = words.permute(3, 0, 1, 5, 2, 4).contiguous()  # [slice, tile, quad, lane, row, k]
    return ordered.view(torch.uint8)


def unpack_codes(packed: Tensor, layout: CodeLayout, shape: tuple[int, int]) -> Tensor:
    """The inverse: codes [N, groups, M]."""
    rows, groups = shape
    ordered = packed.view(_dtype(layout.code_bytes))
    slices, tiles = ordered.shape[:2]
    words = ordered.permute(1, 2, 4, 0, 5, 3)  # [tile, quad, row, slice, k, lane]
    held = layout.tables // layout.groups
    by_table = words.reshape(tiles * TILE_ROWS, slices, held, layout.groups).transpose(-1, -2)
    return by_table.reshape(tiles * TILE_ROWS, slices * layout.groups, held)[:rows, :groups, : layout.num_codebooks]


def _dtype(code_bytes: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[code_bytes]
