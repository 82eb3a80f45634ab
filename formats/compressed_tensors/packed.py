"""pack-quantized: integer codes of 1 to 8 bits as bit streams along the input, zero points along the output.

    P.weight_packed int32 [N, ceil(K*b/32)]    P.weight_scale float [N, G]    P.weight_shape int64 [2] = (N, K)
    P.weight_zero_point int32 [ceil(N*b/32), G], only asymmetric    P.weight_g_idx int32 [K], only older act-order files

The stored fields are the unsigned codes: the library's signed code plus 2**(b-1). Scales have any float dtype.

Widths that do not divide 32 were packed floor(32/b) codes a word by compressed-tensors before 0.18, and densely since.
The number of words tells which; where both layouts have as many, the `version` in the config does. Written densely.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.compressed_tensors.config import Arguments, Group
from aphroquant.formats.compressed_tensors.plain import (
    check_input_scale,
    num_groups,
    read_input_scale,
    row_scales,
    unsigned,
    write_input_scale,
)
from aphroquant.formats.packing import num_words, pack, unpack
from aphroquant.schemes import IntegerScheme, QuantizedWeight


def scheme(module: str, group: Group, headers: Mapping[str, TensorHeader]) -> IntegerScheme:
    """The scheme, from headers alone. The exact K stands in weight_shape, so that `read` checks the widths."""
    arguments = group.weights
    out_features, _ = reading.require_matrix(module, headers, "weight_packed", (torch.int32,))
    reading.require_shape(module, headers, "weight_shape", (torch.int64, torch.int32), (2,))
    groups = num_groups(module, arguments, headers, out_features)
    if not arguments.symmetric:
        found = reading.require_matrix(module, headers, "weight_zero_point", (torch.int32, torch.int8))
        if found not in _zero_point_shapes(arguments.num_bits, out_features, groups):
            raise InputError(
                f"{module}.weight_zero_point has shape {list(found)}, which is not that of {out_features} rows and "
                f"{groups} groups of {arguments.num_bits}-bit zero points"
            )
    check_input_scale(module, group, headers)
    act_order = "weight_g_idx" in headers and groups > 1
    return IntegerScheme(
        arguments.num_bits,
        arguments.group_size,
        arguments.symmetric,
        act_order=act_order,
        activations=group.activations(),
    )


def read(module: str, group: Group, tensors: Mapping[str, Tensor], *, prefer_padded: bool = False) -> QuantizedWeight:
    expected = scheme(module, group, reading.headers_of(tensors))
    packed, bits = tensors["weight_packed"], expected.bits
    shape = _weight_shape(module, tensors, group.weights)
    padded = _layout(f"{module}.weight_packed", packed.shape[1], shape[1], bits, prefer_padded)
    canonical = {
        "codes": unpack(packed, bits, shape[1], padded=padded),
        "scales": row_scales(tensors["weight_scale"], shape[0]),
    }
    if not expected.symmetric:
        canonical["zeros"] = _read_zero_points(module, tensors["weight_zero_point"], shape[0], bits, prefer_padded)
    if expected.act_order:
        canonical["group_index"] = _read_group_index(module, tensors["weight_g_idx"], shape[1], canonical["scales"])
    canonical |= read_input_scale(expected, tensors)
    return QuantizedWeight(expected, canonical, shape)


def write(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    assert isinstance(weight.scheme, IntegerScheme)
    bits = weight.scheme.bits
    writing.require_multiple(
        "compressed-tensors", module, "in_features", weight.shape[1], weight.scheme.group_size or 1
    )
    tensors = {
        "weight_packed": pack(weight["codes"], bits),
        "weight_scale": weight["scales"].contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if not weight.scheme.symmetric:
        tensors["weight_zero_point"] = pack(weight["zeros"], bits, dim=0)
    return tensors | write_input_scale(weight)


def _weight_shape(module: str, tensors: Mapping[str, Tensor], arguments: Arguments) -> tuple[int, int]:
    out_features, in_features = (int(size) for size in tensors["weight_shape"])
    rows, groups = tensors["weight_packed"].shape[0], tensors["weight_scale"].shape[-1]
    if out_features != rows or in_features < 1:
        raise InputError(f"{module}.weight_shape is {[out_features, in_features]}, but weight_packed has {rows} rows")
    if arguments.group_size is not None and in_features != groups * arguments.group_size:
        raise InputError(
            f"{module}.weight_shape is {[out_features, in_features]}, but weight_scale has {groups} groups "
            f"of group_size = {arguments.group_size}"
        )
    return out_features, in_features


def _layout(name: str, words: int, count: int, bits: int, prefer_padded: bool) -> bool:
    """Whether `words` words hold `count` codes in the padded layout (True) or the dense one (False)."""
    dense, padded = num_words(count, bits), num_words(count, bits, padded=True)
    if words not in (dense, padded):
        raise InputError(f"{name} has {words} words for {count} codes of {bits} bits, but needs {dense} (or {padded})")
    return prefer_padded if dense == padded else words == padded


def _zero_point_shapes(bits: int, out_features: int, groups: int) -> set[tuple[int, int]]:
    """Dense words, padded words, and the unpacked bytes of the oldest files."""
    dense, padded = num_words(out_features, bits), num_words(out_features, bits, padded=True)
    return {(dense, groups), (padded, groups), (out_features, groups)}


def _read_zero_points(module: str, stored: Tensor, out_features: int, bits: int, prefer_padded: bool) -> Tensor:
    if stored.dtype == torch.int8:
        return unsigned(f"{module}.weight_zero_point", stored, bits)
    padded = _layout(f"{module}.weight_zero_point", stored.shape[0], out_features, bits, prefer_padded)
    return unpack(stored, bits, out_features, dim=0, padded=padded)


def _read_group_index(module: str, index: Tensor, in_features: int, scales: Tensor) -> Tensor:
    groups = scales.shape[1]
    if index.shape != (in_features,) or ((index < 0) | (index >= groups)).any():
        raise InputError(f"{module}.weight_g_idx must be {in_features} group numbers below {groups}")
    return index.to(torch.int32)
