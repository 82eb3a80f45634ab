"""Small codes in 32-bit words: the bit streams of GPTQ and compressed-tensors, and AWQ's interleaved nibbles.

A *stream* is LSB first and contiguous: code i of width b occupies bits i*b .. i*b + b - 1 of the words laid end to end,
bit 0 being the lowest of the first word. The pattern repeats every `period` codes, which fill a whole number of words
(8 codes in 1 word for 4 bits, 32 codes in 3 words for 3 bits), so each position within the period is one vectorised
shift over the whole tensor. A code may straddle two words. `padded=True` is the older layout of compressed-tensors
(before 0.18) for widths that do not divide 32: floor(32 / b) codes a word, the highest bits unused.

Widths of 2, 4 and 8 bits, which nearly all files have, never straddle bytes: their codes are spread over the bytes of
wider integers, and gathered from them, several at a time. At 4 bits that is ten times as fast, and makes repacking a
checkpoint take about as long as copying it.

Words are int32, as files store them; the sign bit is an ordinary bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
    period, period_words = _period(bits, padded)
    rows = codes.movedim(dim, -1)
    _check_range(rows, bits)
    count = rows.shape[-1]
    if bits in _SPREADING and codes.dtype == torch.uint8 and count * bits % WORD_BITS == 0:
        return _gather(rows.contiguous(), bits).movedim(-1, dim).contiguous()
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


def unpack(words: Tensor, bits: int, count: int, dim: int = -1, *, padded: bool = False) -> Tensor:
    """The first `count` codes along `dim`, uint8, contiguous along `dim`. Inverse of `pack`."""
    period, period_words = _period(bits, padded)
    rows = words.movedim(dim, -1)
    assert rows.shape[-1] >= num_words(count, bits, padded=padded), "too few words"
    if bits in _SPREADING:
        return _spread(rows.contiguous(), bits)[..., :count].movedim(-1, dim)
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


def pack_awq(codes: Tensor) -> Tensor:
    """4-bit codes uint8 [rows, columns] as AWQ gemm stores them: int32 [rows, columns / 8], nibbles interleaved.

    Fast for a `codes` that is the transpose of a contiguous matrix, as a weight's are.
    """
    rows, columns = codes.shape
    transposed = codes.T.contiguous()
    _check_range(transposed, 4)
    eights = transposed.to(torch.uint8).view(columns // AWQ_PACK, AWQ_PACK, rows)
    words = torch.empty(columns // AWQ_PACK, rows, 4, dtype=torch.uint8, device=codes.device)
    for part in _parts(columns // AWQ_PACK, rows):
        for byte in range(4):
            low, high = AWQ_ORDER[2 * byte], AWQ_ORDER[2 * byte + 1]
            words[part, :, byte] = eights[part, low] | (eights[part, high] << 4)
    return words.view(torch.int32)[..., 0].T.contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """The codes [rows, columns], uint8, the transpose of a contiguous matrix. Inverse of `pack_awq`."""
    rows, count = words.shape
    stored = words.T.contiguous()
    codes = torch.empty(count, AWQ_PACK, rows, dtype=torch.uint8, device=words.device)
    for part in _parts(count, rows):
        for nibble, column in enumerate(AWQ_ORDER):
            codes[part, column] = (stored[part] >> (4 * nibble)) & 15
    return codes.view(count * AWQ_PACK, rows).T


# Codes of a byte, spread over the bytes of an integer of this type by these shifts and masks, and gathered again.
_SPREADING: Mapping[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    4: (torch.int16, ((4, 0x0F0F),)),
    8: (torch.uint8, ()),
}


_CHUNK = 2**18  # elements handled at once, so that what lies between is in the processor's cache


def _parts(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` things of that many elements, each of about a chunk."""
    step = max(1, _CHUNK // max(size, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _spread(words: Tensor, bits: int) -> Tensor:
    """All codes of contiguous words [..., n]: uint8 [..., n * 32 / bits]."""
    wide, steps = _SPREADING[bits]
    stored = words.flatten().view(torch.uint8)  # flat: a dimension of one may have any stride
    codes = torch.empty(stored.shape[0], dtype=wide, device=words.device)
    for start in range(0, stored.shape[0], _CHUNK):
        part = codes[start : start + _CHUNK]
        part.copy_(stored[start : start + _CHUNK])
        for shift, mask in steps:
            part |= part << shift
            part &= mask
    return codes.view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * (WORD_BITS // bits))


def _gather(codes: Tensor, bits: int) -> Tensor:
    """Contiguous codes that fill whole words, as words. Inverse of `_spread`."""
    wide, steps = _SPREADING[bits]
    spread = codes.flatten().view(wide)
    packed = torch.empty(spread.shape[0], dtype=torch.uint8, device=codes.device)
    for start in range(0, spread.shape[0], _CHUNK):
        part = spread[start : start + _CHUNK]
        for index in reversed(range(len(steps))):
            part = part | (part >> steps[index][0])
            if index:
                part &= steps[index - 1][1]
        packed[start : start + _CHUNK] = part
    return packed.view(torch.int32).view(*codes.shape[:-1], codes.shape[-1] // (WORD_BITS // bits))


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
