"""Small codes in 32-bit words: the bit streams of GPTQ and compressed-tensors, and AWQ's interleaved nibbles.

A *stream* is LSB first and contiguous: code i of width b occupies bits i*b .. i*b + b - 1 of the words laid end to end,
bit 0 being the lowest of the first word. The pattern repeats every `period` codes, which fill a whole number of words
(8 codes in 1 word for 4 bits, 32 codes in 3 words for 3 bits), so each position within the period is one vectorised
shift over the whole tensor. A code may straddle two words. `padded=True` is the older layout of compressed-tensors
(before 0.18) for widths that do not divide 32: floor(32 / b) codes a word, the highest bits unused.

Words are int32, as files store them; the sign bit is an ordinary bit.

What stands here in torch says what is correct. The compiled library does the same for matrices on the CPU in a
thirtieth of the time, so that repacking a checkpoint takes about as long as copying it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aphroquant.kernels.cpu import codes as compiled

WORD_BITS = 32
AWQ_PACK = 8  # nibbles in a word
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i] of its eight


def num_words(count: int, bits: int, *, padded: bool = False) -> int:
    """How many words hold `count` codes."""
    if padded:
        return math.ceil(count / (WORD_BITS // bits))
    return math.ceil(count * bits / WORD_BITS)


def pack(codes: Tensor, bits: int, dim: int = -1, *, padded: bool = False) -> Tensor:
    """Codes (integers 0 .. 2**bits - 1) packed along `dim` into int32 words; the last word is filled with zero bits."""
    if codes.ndim != 2 or codes.dtype != torch.uint8 or not _is_compiled(codes, bits, padded=padded):
        return pack_in_torch(codes, bits, dim, padded=padded)
    if dim % 2 == 1:
        words, union = compiled.pack(codes.contiguous(), bits)
    else:
        words, union = compiled.pack_across(codes.T.contiguous(), bits)
    assert union < 2**bits, f"codes wider than {bits} bits"
    return words


def unpack(words: Tensor, bits: int, count: int, dim: int = -1, *, padded: bool = False) -> Tensor:
    """The first `count` codes along `dim`, uint8, contiguous along `dim`. Inverse of `pack`."""
    assert words.shape[dim] >= num_words(count, bits, padded=padded), "too few words"
    if words.ndim != 2 or words.dtype != torch.int32 or not _is_compiled(words, bits, padded=padded):
        return unpack_in_torch(words, bits, count, dim, padded=padded)
    if dim % 2 == 1:
        return compiled.unpack(words.contiguous(), bits, count)
    return compiled.unpack_across(words.contiguous(), bits, count).T


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [rows, columns] as AWQ gemm stores them: int32 [rows, columns / 8], nibbles interleaved.

    Fast for a `codes` that is the transpose of a contiguous matrix, as a weight's are.
    """
    if codes.dtype != torch.uint8 or not compiled.usable(codes):
        return pack_awq_in_torch(codes)
    words, union = compiled.pack_awq(codes.T.contiguous())
    assert union < 2**4, "codes wider than 4 bits"
    return words


def unpack_awq(words: Tensor) -> Tensor:
    """The codes [rows, columns], uint8, the transpose of a contiguous matrix. Inverse of `pack_awq`."""
    if words.dtype != torch.int32 or not compiled.usable(words):
        return unpack_awq_in_torch(words)
    return compiled.unpack_awq(words.contiguous()).T


def pack_in_torch(codes: Tensor, bits: int, dim: int = -1, *, padded: bool = False) -> Tensor:
    """What `pack` gives, on any device and of any integers."""
    period, period_words = _period(bits, padded)
    rows = codes.movedim(dim, -1)
    _check_range(rows, bits)
    count = rows.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, -count % period))
    rows = rows.reshape(*rows.shape[:-1], rows.shape[-1] // period, period)  # [..., periods, period]
    words = torch.zeros(*rows.shape[:-1], period_words, dtype=torch.int32, device=codes.device)
    for position in range(period):
        word, shift = _place(position, bits, padded)
        field = rows[..., position].to(torch.int32)
        words[..., word] |= field << shift
        if shift + bits > WORD_BITS:  # the high bits go on in the next word
            words[..., word + 1] |= field >> (WORD_BITS - shift)
    words = words.flatten(-2)[..., : num_words(count, bits, padded=padded)]
    return words.movedim(-1, dim).contiguous()


def unpack_in_torch(words: Tensor, bits: int, count: int, dim: int = -1, *, padded: bool = False) -> Tensor:
    """What `unpack` gives, on any device."""
    period, period_words = _period(bits, padded)
    rows = words.movedim(dim, -1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % period_words))
    rows = rows.reshape(*rows.shape[:-1], rows.shape[-1] // period_words, period_words)  # [..., periods, period_words]
    codes = torch.empty(*rows.shape[:-1], period, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for position in range(period):
        word, shift = _place(position, bits, padded)
        field = rows[..., word] >> shift
        if shift + bits > WORD_BITS:
            low_bits = WORD_BITS - shift  # the arithmetic shift has filled the rest with sign bits
            field = (field & (2**low_bits - 1)) | (rows[..., word + 1] << low_bits)
        codes[..., position] = (field & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count].movedim(-1, dim)


def pack_awq_in_torch(codes: Tensor) -> Tensor:
    """What `pack_awq` gives, on any device and of any integers."""
    _check_range(codes, 4)
    rows, columns = codes.shape
    eights = codes.to(torch.int32).reshape(rows, columns // AWQ_PACK, AWQ_PACK)
    words = torch.zeros(rows, columns // AWQ_PACK, dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= eights[..., column] << (4 * nibble)
    return words


def unpack_awq_in_torch(words: Tensor) -> Tensor:
    """What `unpack_awq` gives, on any device."""
    stored = words.T.contiguous()
    codes = torch.empty(words.shape[1], AWQ_PACK, words.shape[0], dtype=torch.uint8, device=words.device)
    for nibble, column in enumerate(AWQ_ORDER):
        codes[:, column] = ((stored >> (4 * nibble)) & 15).to(torch.uint8)
    return codes.view(words.shape[1] * AWQ_PACK, words.shape[0]).T


def _is_compiled(tensor: Tensor, bits: int, *, padded: bool) -> bool:
    """Whether the library has this layout: where no bits are unused, the older one is the same."""
    return (not padded or WORD_BITS % bits == 0) and compiled.usable(tensor)


def _check_range(codes: Tensor, bits: int) -> None:
    assert not codes.numel() or 0 <= int(codes.min()) <= int(codes.max()) < 2**bits, f"codes wider than {bits} bits"


def _period(bits: int, padded: bool) -> tuple[int, int]:
    """(codes, words) after which the layout repeats."""
    assert 1 <= bits <= 8, bits
    if padded:
        return WORD_BITS // bits, 1
    common = math.gcd(WORD_BITS, bits)
    return WORD_BITS // common, bits // common


def _place(position: int, bits: int, padded: bool) -> tuple[int, int]:
    """(word, lowest bit) of a code within its period."""
    return (0, position * bits) if padded else divmod(position * bits, WORD_BITS)
