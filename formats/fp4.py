"""Four-bit codes in bytes, and the scales of microscaling formats: what the FP4 layouts have in common.

A global scale is stored either as the factor (ModelOpt) or as its reciprocal, a divisor (compressed-tensors). Held as a
float64 factor, each comes back to the last bit; turned into the other, it is rounded to float32 once, which changes
every weight of the tensor by the same factor, at most 1 + 2**-24.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import TensorHeader

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def pack_nibbles(codes: Tensor, *, low_first: bool = True) -> Tensor:
    """Codes [..., n] (n even, 0 .. 15) as bytes [..., n/2]: the first of a pair in the low nibble, or in the high."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    return (first | second << 4) if low_first else (first << 4 | second)


def unpack_nibbles(packed: Tensor, *, low_first: bool = True) -> Tensor:
    """The codes, uint8. Inverse of `pack_nibbles`."""
    low, high = packed & 15, packed >> 4
    pair = (low, high) if low_first else (high, low)
    return torch.stack(pair, dim=-1).flatten(-2)


def exponent_scales(stored: Tensor) -> Tensor:
    """float8_e8m0fnu of exponent bytes, biased by 127, whichever dtype names them."""
    return stored.contiguous().view(torch.float8_e8m0fnu)


def require_packed(module: str, headers: Mapping[str, TensorHeader], name: str) -> tuple[int, int]:
    """The shape (N, K) of a weight whose bytes [N, K/2] hold two codes each."""
    out_features, in_bytes = reading.require_matrix(module, headers, name, (torch.uint8,))
    return out_features, in_bytes * 2


def require_block_scales(
    module: str,
    headers: Mapping[str, TensorHeader],
    name: str,
    dtypes: Iterable[torch.dtype],
    shape: tuple[int, int],
    block_size: int,
) -> None:
    """Check that scales are [N, K / block_size]."""
    if shape[1] % block_size:
        raise InputError(f"{module}: in_features = {shape[1]} is no multiple of the block size {block_size}")
    reading.require_shape(module, headers, name, dtypes, (shape[0], shape[1] // block_size))


def require_number(module: str, headers: Mapping[str, TensorHeader], name: str) -> None:
    """Check that a tensor is one floating-point number."""
    found = reading.require(module, headers, name, reading.SCALE_DTYPES).shape
    if math.prod(found) != 1:
        raise InputError(f"{module}.{name} has shape {list(found)}, but must be one number")


def factor(module: str, name: str, stored: Tensor) -> Tensor:
    """A stored global scale that is multiplied with, float64 []."""
    value = stored.double().reshape(())
    if not 0 <= float(value) < math.inf:
        raise InputError(f"{module}.{name} = {float(value)} must be finite and not negative")
    return value


def factor_of_divisor(module: str, name: str, stored: Tensor) -> Tensor:
    """The factor, float64 [], of a stored global scale that is divided by. Infinity is that of a weight of zeros."""
    value = stored.double().reshape(())
    if not float(value) > 0:
        raise InputError(f"{module}.{name} = {float(value)} must be positive")
    return 1 / value


def stored_factor(target: str, module: str, name: str, scale: Tensor) -> Tensor:
    """float32 []: exactly the factor that `factor` read, else the nearest. Inverse of `factor`."""
    return _nearest(target, module, name, scale.double().reshape(()))


def stored_divisor(target: str, module: str, name: str, scale: Tensor) -> Tensor:
    """float32 []: exactly the divisor that `factor_of_divisor` read, else the nearest. Inverse of it."""
    return _nearest(target, module, name, 1 / scale.double().reshape(()))


def _nearest(target: str, module: str, name: str, value: Tensor) -> Tensor:
    """float32, unless that is no close approximation (beyond its range, or below its full precision)."""
    nearest = value.float()
    if nearest.double() != value and not abs(float(nearest.double() / value) - 1) <= 2**-24:
        raise UsageError(
            f"{module}: {name} = {float(value)!r} is beyond the float32 that {target} needs", hint=writing.REQUANTIZE
        )
    return nearest
