"""AWQ's other layouts, made for kernels of one row, which are read and not written: "gemv" and "gemv_fast".

    gemv:      P.qweight int32 [N, K/8], nibbles in order    P.qzeros int32 [N, W]      P.scales float16 [N, 8W]
    gemv_fast: P.qweight int16 [N/4, K]                      P.qzeros float16 [8W, N]   P.scales float16 [8W, N]

W words of 8 zero points hold the K/G groups, filled up to a multiple of 1, 2 or 4 words for groups of 128, 64 or 32.
gemv_fast (llm-awq's layout; `scaled_zeros` in its older files) packs four rows together: of every 64 columns, the codes
of the first row stand before those of the next, four codes a word; and of every 32 columns, code 4j + i is that of
column 8i + j. Its zero points are stored as -scale * zero, from which the zero follows to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats import reading
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.packing import AWQ_PACK, unpack
from aphroquant.schemes import IntegerScheme, QuantizedWeight

GEMV, GEMV_FAST = "gemv", "gemv_fast"
BITS, LIMIT = 4, 15
ROWS, STRIDE, BLOCK = 4, 64, 32  # of gemv_fast: rows in a word, columns that stand together, columns that are mixed
_ZEROS = ("qzeros", "scaled_zeros")


def scheme(
    module: str, headers: Mapping[str, TensorHeader], version: str, group_size: int | None, *, symmetric: bool
) -> IntegerScheme:
    """The scheme, from headers alone."""
    shape = _shape(module, headers, version)
    words = _zero_words(module, shape[1], group_size)
    if version == GEMV:
        reading.require_shape(module, headers, "scales", reading.SCALE_DTYPES, (shape[0], words * AWQ_PACK))
        reading.require_shape(module, headers, "qzeros", (torch.int32,), (shape[0], words))
    else:
        stored = (words * AWQ_PACK, shape[0])
        reading.require_shape(module, headers, "scales", reading.SCALE_DTYPES, stored)
        reading.require_shape(module, headers, _zeros_name(headers), reading.SCALE_DTYPES, stored)
    return IntegerScheme(BITS, group_size, symmetric)


def read(module: str, tensors: Mapping[str, Tensor], version: str, expected: IntegerScheme) -> QuantizedWeight:
    """The weight; zero points of a symmetric scheme are checked to be 8."""
    headers = reading.headers_of(tensors)
    shape = _shape(module, headers, version)
    groups = expected.num_groups(shape[1])
    if version == GEMV:
        codes = unpack(tensors["qweight"], BITS, shape[1])
        scales = tensors["scales"][:, :groups].contiguous()
        zeros = unpack(tensors["qzeros"], BITS, groups)
    else:
        name = _zeros_name(headers)
        codes = _unpack_fast(tensors["qweight"])
        scales = tensors["scales"][:groups].T.contiguous()
        zeros = _unscaled(f"{module}.{name}", tensors[name][:groups].T, scales)
    canonical = {"codes": codes.contiguous(), "scales": scales}
    if not expected.symmetric:
        canonical["zeros"] = zeros.contiguous()
    elif not (zeros == 2 ** (BITS - 1)).all():
        raise InputError(
            f"{module}: the zero points are not all 8, although quantization_config says that they are symmetric",
            hint='with "zero_point": true and without "sym" they are read as they are',
        )
    return QuantizedWeight(expected, canonical, shape)


def _shape(module: str, headers: Mapping[str, TensorHeader], version: str) -> tuple[int, int]:
    """(N, K), from the header of qweight."""
    if version == GEMV:
        rows, words = reading.require_matrix(module, headers, "qweight", (torch.int32,))
        return rows, words * AWQ_PACK
    words, columns = reading.require_matrix(module, headers, "qweight", (torch.int16,))
    if columns % STRIDE:
        raise InputError(f"{module}.qweight has {columns} columns, but AWQ gemv_fast packs {STRIDE} together")
    return words * ROWS, columns


def _zero_words(module: str, in_features: int, group_size: int | None) -> int:
    """Words of zero points in a row."""
    size = group_size or in_features
    if in_features % size or (size not in (32, 64) and size < 128):
        raise InputError(
            f"{module}: group_size = {size} with in_features = {in_features} is none of AWQ gemv's, which are 32, 64 "
            f"and from 128 on, and divide"
        )
    multiple = {32: 4, 64: 2}.get(size, 1)
    words = -(-(in_features // size) // AWQ_PACK)
    return -(-words // multiple) * multiple


def _zeros_name(headers: Mapping[str, TensorHeader]) -> str:
    return next((name for name in _ZEROS if name in headers), _ZEROS[0])


def _unpack_fast(words: Tensor) -> Tensor:
    """uint8 [N, K] of int16 [N/4, K]."""
    packed_rows, columns = words.shape
    fields = torch.stack([words >> 4 * place & LIMIT for place in range(4)], dim=-1).to(torch.uint8)
    rows = fields.view(packed_rows, columns // STRIDE, ROWS, STRIDE).transpose(1, 2)  # [N/4, 4, K/64, 64]
    mixed = rows.reshape(packed_rows * ROWS, columns // BLOCK, BLOCK // 4, 4)
    return mixed.transpose(-1, -2).reshape(packed_rows * ROWS, columns)


def _unscaled(name: str, stored: Tensor, scales: Tensor) -> Tensor:
    """The zero points uint8 [N, G] of which `stored` are minus the multiples of `scales`, rounded once."""
    quotient = torch.where(scales == 0, 0.0, -stored.double() / scales.double())
    zeros = torch.nan_to_num(quotient, nan=-1.0).round()
    again = -(scales.float() * zeros.float()).to(stored.dtype)
    wrong = (zeros < 0) | (zeros > LIMIT) | (again != stored)
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise InputError(
            f"{name}: the value {float(stored[tuple(where)])!r} of row {where[0]}, group {where[1]} is not minus the "
            f"scale {float(scales[tuple(where)])!r} times a zero point of 0 to {LIMIT}"
        )
    return zeros.to(torch.uint8)
