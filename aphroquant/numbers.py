"""Questions about all numbers of a tensor, answered without making a tensor of answers: each byte is looked at once."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from aphroquant.kernels.cpu import codes as compiled

_CHUNK = 2**20  # numbers looked at at once, so that the comparison stays in the processor's cache
_MAGNITUDE = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFFFFFF}  # all bits but the sign, by width in bytes
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are; integers always are."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    first = _first_code_of_no_number(tensor.dtype)
    if first is not None and compiled.usable(tensor):
        return compiled.largest_masked(tensor.contiguous(), _MAGNITUDE[tensor.dtype.itemsize]) < first
    return is_finite_in_torch(tensor)


def is_finite_in_torch(tensor: Tensor) -> bool:
    """What `is_finite` gives, on any device and of any floats."""
    if tensor.dtype.itemsize > 1:
        return bool(torch.isfinite(tensor).all())
    codes = tensor.contiguous().view(torch.uint8).flatten()
    bad = _codes_of_no_number(tensor.dtype)
    return not any(bool((part == code).any()) for part in torch.split(codes, _CHUNK) for code in bad)


def largest_magnitude(tensor: Tensor) -> Tensor:
    """The largest |x|, float32 []; zero if there is none. Numbers are finite, in float32, float16 or bfloat16."""
    if not tensor.numel():
        return torch.zeros(())
    if not compiled.usable(tensor):
        return tensor.abs().amax().float()
    width = tensor.dtype.itemsize
    bits = compiled.largest_masked(tensor.contiguous(), _MAGNITUDE[width])
    return torch.tensor([bits], dtype=_INTEGERS[width]).view(tensor.dtype)[0].float()


def largest_byte(codes: Tensor) -> int:
    """The largest number of a uint8 tensor; zero if there is none."""
    if not codes.numel():
        return 0
    return compiled.largest_masked(codes.contiguous(), 0xFF) if compiled.usable(codes) else int(codes.max())


def same_bytes(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits."""
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs)]
    if any(tensor.device.type != "cpu" for tensor in flat):
        return torch.equal(*flat)
    one, other = flat
    return not _memcmp()(one.data_ptr(), other.data_ptr(), one.numel())  # four times as fast as any == of tensors


@cache
def _memcmp() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    found = ctypes.CDLL(None).memcmp  # of the C library
    found.restype, found.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return found


@cache
def _first_code_of_no_number(dtype: torch.dtype) -> int | None:
    """The bits, without the sign, from which on there are only infinity and NaN; None if the dtype is not like that."""
    if dtype.itemsize == 1:
        bad = _codes_of_no_number(dtype)
        return bad[0] if bad and bad == [*range(bad[0], 128), *range(bad[0] + 128, 256)] else None
    if dtype.itemsize > 4:
        return None
    infinity = torch.tensor([torch.inf], dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return int(infinity[0])


@cache
def _codes_of_no_number(dtype: torch.dtype) -> list[int]:
    """The bytes that mean NaN or infinity in an 8-bit float."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return (~values.isfinite()).nonzero().flatten().tolist()
