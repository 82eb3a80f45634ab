"""Packing and unpacking codes at the speed of memory; `aphroquant/formats/packing.py` says what the layouts are.

Tensors are on the CPU and contiguous unless said otherwise; `usable` tells whether the library is there at all. Memory
comes from `aphroquant/buffers.py`.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from aphroquant import buffers
from aphroquant.kernels.cpu.abi import address
from aphroquant.kernels.cpu.library import library, obstacle

_WORD_BITS = 32


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions can be called with these tensors."""
    return all(tensor.device.type == "cpu" for tensor in tensors) and obstacle() is None


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [N, count] of words int32 [N, W], which may have more than are needed."""
    rows, stride = words.shape
    codes = buffers.empty((rows, count), torch.uint8)
    if codes.numel():
        library().aq_unpack(address(words), stride, rows, count, bits, address(codes))
    return codes


def unpack_across(words: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [N, count] of words int32 [W, N]."""
    rows = words.shape[1]
    codes = buffers.empty((rows, count), torch.uint8)
    if codes.numel():
        library().aq_unpack_across(address(words), rows, count, bits, address(codes))
    return codes


def unpack_awq(words: Tensor) -> Tensor:
    """uint8 [N, K] of AWQ's words int32 [K, N / 8]."""
    count, num_words = words.shape
    codes = buffers.empty((num_words * 8, count), torch.uint8)
    if codes.numel():
        library().aq_unpack_awq(address(words), num_words * 8, count, address(codes))
    return codes


def pack(codes: Tensor, bits: int) -> tuple[Tensor, int]:
    """int32 [N, W] of codes uint8 [N, K], and the union of all codes."""
    rows, count = codes.shape
    words = buffers.empty((rows, ceil(count * bits / _WORD_BITS)), torch.int32)
    if not codes.numel():
        return words, 0
    return words, library().aq_pack(address(codes), rows, count, bits, address(words))


def pack_across(codes: Tensor, bits: int) -> tuple[Tensor, int]:
    """int32 [W, N] of codes uint8 [N, K], and the union of all codes."""
    rows, count = codes.shape
    words = buffers.empty((ceil(count * bits / _WORD_BITS), rows), torch.int32)
    if not codes.numel():
        return words, 0
    return words, library().aq_pack_across(address(codes), rows, count, bits, address(words))


def pack_awq(codes: Tensor) -> tuple[Tensor, int]:
    """AWQ's words int32 [K, N / 8] of codes uint8 [N, K], and the union of all codes."""
    rows, count = codes.shape
    words = buffers.empty((count, rows // 8), torch.int32)
    if not codes.numel():
        return words, 0
    return words, library().aq_pack_awq(address(codes), rows, count, address(words))


def largest_masked(numbers: Tensor, mask: int) -> int:
    """The largest bits & mask of numbers of 1, 2 or 4 bytes, in any shape; 0 if there are none."""
    found: int = library().aq_largest_masked(address(numbers), numbers.numel(), numbers.dtype.itemsize, mask)
    return found
