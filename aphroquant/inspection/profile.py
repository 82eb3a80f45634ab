"""What there is to know about the numbers of one matrix, gathered from pieces of its rows in a single pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aphroquant.inspection.arrangement import Arrangement
from aphroquant.schemes import (
    AdditiveScheme,
    DenseScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

LARGEST_FP8 = 0x7E  # 448, without the sign
_SIGNLESS = 0x7F
# Canonical tensors that must be positive wherever they are anything; integer scales may be negative.
_POSITIVE = ("global_scale", "input_scale")


@dataclass
class Scales:
    """Counts over one tensor of scales."""

    count: int = 0
    not_finite: int = 0
    negative: int = 0
    coarse: int = 0  # subnormal, and rounded so coarsely that it moves weights
    lost: int = 0  # zero, although codes of its group are not
    smallest: float = math.inf  # of the positive ones
    largest: float = 0.0


@dataclass
class Profile:
    """Figures of one matrix. `levels` counts each code; `used` are the entries of each codebook that occur."""

    module: str
    scheme: Scheme
    shape: tuple[int, int] = (0, 0)
    not_finite: int = 0
    zero_rows: int = 0
    largest: float = 0.0
    sum_squares: float = 0.0
    sum_values: float = 0.0
    levels: Tensor | None = None
    scales: dict[str, Scales] = field(default_factory=dict)
    used: Tensor | None = None
    blocks: int = 0
    blocks_without_extreme: int = 0
    range_use: float = 0.0  # summed over groups: the largest distance from the zero point, as a share of the possible
    groups: int = 0
    wrapping_zeros: int = 0
    arrangement: Arrangement = field(default_factory=Arrangement)

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def rms(self) -> float:
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0

    @property
    def is_zero(self) -> bool:
        return self.count > 0 and self.zero_rows == self.shape[0]

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for equal matrices, and hardly ever for others."""
        return self.shape, self.sum_squares, self.sum_values, self.largest


def profile(module: str, scheme: Scheme, pieces: Iterable[QuantizedWeight]) -> Profile:
    """The figures of a matrix given as pieces of consecutive rows."""
    found = Profile(module, scheme)
    for number, piece in enumerate(pieces):
        found.shape = found.shape[0] + piece.shape[0], piece.shape[1]
        _add_values(found, piece)
        _add_scales(found, piece, is_first=number == 0)
        _add_codes(found, piece)
    return found


def _add_values(found: Profile, piece: QuantizedWeight) -> None:
    dense = piece["weight"].float() if isinstance(piece.scheme, DenseScheme) else piece.dequantize()
    if not dense.numel():
        return
    lowest, highest = (float(edge) for edge in dense.aminmax())
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        bad = ~dense.isfinite()
        found.not_finite += int(bad.sum())
        dense = dense.masked_fill(bad, 0.0)
        lowest, highest = (float(edge) for edge in dense.aminmax())
    found.largest = max(found.largest, -lowest, highest)
    squares = dense.square().sum(1, dtype=torch.float64)
    found.zero_rows += int((squares == 0).sum())
    found.sum_squares += float(squares.sum())
    found.sum_values += float(dense.sum(dtype=torch.float64))


def _add_scales(found: Profile, piece: QuantizedWeight, *, is_first: bool) -> None:
    shared = ("global_scale", "input_scale", "codebooks", "nested_offset")
    for name, tensor in piece.tensors.items():
        if not tensor.dtype.is_floating_point or name == "weight" or (name in shared and not is_first):
            continue
        if name == "codes":
            _count_fp8(found, tensor)
            continue
        values = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
        entry = found.scales.setdefault(name, Scales())
        finite = values.isfinite()
        positive = values[finite & (values > 0)]
        entry.count += values.numel()
        entry.not_finite += int((~finite).sum())
        entry.negative += int((values < 0).sum())
        if positive.numel():
            entry.smallest = min(entry.smallest, float(positive.min()))
            entry.largest = max(entry.largest, float(positive.max()))
        if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32):
            entry.coarse += int((positive < _coarse_below(tensor.dtype, found.scheme)).sum())


def _coarse_below(dtype: torch.dtype, scheme: Scheme) -> float:
    """Below it the rounding of a subnormal scale moves a weight by more than half a step, as rounding its code does.

    Of K-quants, whose factors are subnormal nearly always, the integers make up for it down to the last two factors.
    """
    limits = torch.finfo(dtype)
    bits = 2 if isinstance(scheme, KQuantScheme) else getattr(scheme, "bits", 8)
    return float(min(limits.smallest_normal, limits.smallest_normal * limits.eps * 2 ** (bits - 1)))


def _count_fp8(found: Profile, codes: Tensor) -> None:
    if codes.dtype != torch.float8_e4m3fn:
        return
    counted = torch.bincount(codes.view(torch.uint8).flatten() & _SIGNLESS, minlength=128)
    found.levels = counted if found.levels is None else found.levels + counted


def _add_codes(found: Profile, piece: QuantizedWeight) -> None:
    scheme = piece.scheme
    if isinstance(scheme, AdditiveScheme):
        _count_entries(found, piece["codes"], scheme)
    elif isinstance(scheme, IntegerScheme | KQuantScheme | LookupScheme) and piece["codes"].numel():
        counted = torch.bincount(piece["codes"].flatten(), minlength=2**scheme.bits)
        found.levels = counted if found.levels is None else found.levels + counted
    if isinstance(scheme, LookupScheme) and scheme.table in ("nf4", "fp4") and scheme.flattened:
        _count_extremes(found, piece["codes"], scheme)
    if isinstance(scheme, IntegerScheme) and not scheme.has_offsets and piece["codes"].numel():
        _add_groups(found, piece, scheme)


def _count_entries(found: Profile, codes: Tensor, scheme: AdditiveScheme) -> None:
    if found.used is None:
        found.used = torch.zeros(scheme.num_codebooks, 2**scheme.code_bits, dtype=torch.bool)
    for book in range(scheme.num_codebooks):
        found.used[book][codes[..., book].flatten().long()] = True


def _count_extremes(found: Profile, codes: Tensor, scheme: LookupScheme) -> None:
    """Blocks whose scale is no value's magnitude: dividing by the largest one gives -1 or 1 at least once."""
    extreme = scheme.table_values().abs() == 1
    whole = codes.numel() // scheme.block_size
    blocks = codes.flatten()[: whole * scheme.block_size].view(whole, scheme.block_size)
    found.blocks += whole
    found.blocks_without_extreme += whole - int(extreme[blocks.int()].any(1).sum())


def _add_groups(found: Profile, piece: QuantizedWeight, scheme: IntegerScheme) -> None:
    """What relates codes to the zero points and scales of their groups."""
    rows, columns = piece.shape
    size = scheme.group_size or columns
    scales = piece["scales"].float()
    if scheme.act_order or columns % size:
        return
    codes = piece["codes"].view(rows, columns // size, size)
    zeros = piece["zeros"] if "zeros" in piece.tensors else torch.full_like(scales, 2 ** (scheme.bits - 1))
    low, high = codes.amin(-1).float() - zeros, codes.amax(-1).float() - zeros
    reach = torch.maximum(high, -low)
    found.groups += reach.numel()
    found.range_use += float(reach.sum()) / 2 ** (scheme.bits - 1)
    found.scales["scales"].lost += int(((scales == 0) & (reach > 0)).sum())
    if "zeros" in piece.tensors:
        found.wrapping_zeros += int((zeros == 0).sum())
    found.arrangement.add(codes, zeros.float(), scales, has_zeros="zeros" in piece.tensors)
