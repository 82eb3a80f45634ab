"""int-quantized and float-quantized: codes in their own dtype, unpacked, with scales beside them.

    int-quantized:    P.weight int8 [N, K], signed      P.weight_scale float [N, G]    P.weight_zero_point int8 [N, G]
    float-quantized:  P.weight float8_e4m3fn [N, K]     P.weight_scale float [1] | [N, 1] | [ceil(N/r), ceil(K/c)]
    both, static:     P.input_scale float [1]

int8 codes are the unsigned ones less 2**(b-1), and so are zero points. Scales have any float dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.compressed_tensors.config import Arguments, Group
from aphroquant.schemes import FloatScheme, Granularity, IntegerScheme, QuantizedWeight

FP8 = torch.float8_e4m3fn
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def integer_scheme(module: str, group: Group, headers: Mapping[str, TensorHeader]) -> IntegerScheme:
    arguments = group.weights
    out_features, in_features = reading.require_matrix(module, headers, "weight", (torch.int8,))
    groups = num_groups(module, arguments, headers, out_features)
    if arguments.group_size is not None and groups * arguments.group_size != in_features:
        raise InputError(
            f"{module}.weight_scale has {groups} groups, but in_features = {in_features} "
            f"with group_size = {arguments.group_size} needs {in_features / arguments.group_size:g}"
        )
    if not arguments.symmetric:
        shape = reading.require(module, headers, "weight_scale", reading.SCALE_DTYPES).shape
        reading.require_shape(module, headers, "weight_zero_point", INTEGERS, shape)
    check_input_scale(module, group, headers)
    return IntegerScheme(arguments.num_bits, arguments.group_size, arguments.symmetric, activations=group.activations())


def read_integer(module: str, group: Group, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    expected = integer_scheme(module, group, reading.headers_of(tensors))
    codes = unsigned(f"{module}.weight", tensors["weight"], expected.bits)
    shape = (codes.shape[0], codes.shape[1])
    canonical = {"codes": codes, "scales": row_scales(tensors["weight_scale"], shape[0])}
    if not expected.symmetric:
        zeros = row_scales(tensors["weight_zero_point"], shape[0])
        canonical["zeros"] = unsigned(f"{module}.weight_zero_point", zeros, expected.bits)
    return QuantizedWeight(expected, canonical | read_input_scale(expected, tensors), shape)


def write_integer(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    assert isinstance(weight.scheme, IntegerScheme)
    bits = weight.scheme.bits
    divisor = weight.scheme.group_size or 1
    writing.require_multiple("compressed-tensors", module, "in_features", weight.shape[1], divisor)
    tensors = {"weight": _signed(weight["codes"], bits), "weight_scale": weight["scales"].contiguous()}
    if not weight.scheme.symmetric:
        tensors["weight_zero_point"] = _signed(weight["zeros"], bits)
    return tensors | write_input_scale(weight)


def float_scheme(module: str, group: Group, headers: Mapping[str, TensorHeader]) -> FloatScheme:
    out_features, in_features = reading.require_matrix(module, headers, "weight", (FP8,))
    granularity, block_shape, expected = _scale_layout(group.weights, out_features, in_features)
    found = reading.require(module, headers, "weight_scale", reading.SCALE_DTYPES).shape
    if found not in expected:
        raise InputError(
            f"{module}.weight_scale has shape {list(found)}, but strategy {group.weights.strategy!r} on a weight "
            f"{[out_features, in_features]} needs {list(expected[0])}"
        )
    check_input_scale(module, group, headers)
    return FloatScheme(granularity, block_shape, group.activations())


def read_float(module: str, group: Group, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    expected = float_scheme(module, group, reading.headers_of(tensors))
    codes, scales = tensors["weight"], tensors["weight_scale"]
    if expected.granularity != "block":
        scales = scales.reshape(() if expected.granularity == "tensor" else (-1, 1))
    canonical = {"codes": codes, "scales": scales} | read_input_scale(expected, tensors)
    return QuantizedWeight(expected, canonical, (codes.shape[0], codes.shape[1]))


def write_float(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    scales = weight["scales"].contiguous()
    tensors = {"weight": weight["codes"].contiguous(), "weight_scale": scales if scales.ndim else scales.reshape(1)}
    return tensors | write_input_scale(weight)


def num_groups(module: str, arguments: Arguments, headers: Mapping[str, TensorHeader], out_features: int) -> int:
    """How many groups a row of weight_scale has, after checking its shape."""
    found = reading.require(module, headers, "weight_scale", reading.SCALE_DTYPES).shape
    if arguments.strategy == "group" and len(found) == 2 and found[0] == out_features and found[1]:
        return found[1]
    if arguments.strategy == "channel" and found in ((out_features, 1), (out_features,)):
        return 1
    if arguments.strategy == "tensor" and math.prod(found) == 1:
        return 1
    raise InputError(
        f"{module}.weight_scale has shape {list(found)}, which is not that of {out_features} rows "
        f"with strategy {arguments.strategy!r}"
    )


def row_scales(scales: Tensor, out_features: int) -> Tensor:
    """[N, G] of the stored [N, G], [N] or one number."""
    if scales.ndim == 2 and scales.shape[0] == out_features:
        return scales
    return scales.reshape(-1, 1).expand(out_features, 1).contiguous()


def check_input_scale(module: str, group: Group, headers: Mapping[str, TensorHeader]) -> None:
    if group.inputs is None or group.inputs.dynamic:
        return
    found = reading.require(module, headers, "input_scale", reading.SCALE_DTYPES).shape
    if math.prod(found) != 1:
        raise InputError(f"{module}.input_scale has shape {list(found)}, but must be one number")


def read_input_scale(scheme: IntegerScheme | FloatScheme, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if scheme.activations is None or scheme.activations.dynamic:
        return {}
    return {"input_scale": tensors["input_scale"].float().reshape(())}


def write_input_scale(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Inverse of `read_input_scale`."""
    if "input_scale" not in weight.tensors:
        return {}
    return {"input_scale": weight["input_scale"].to(torch.float32).reshape(1)}


def unsigned(name: str, signed: Tensor, bits: int) -> Tensor:
    """Signed codes of b bits as 0 .. 2**b - 1."""
    codes = signed.to(torch.int16).add(2 ** (bits - 1))
    outside = (codes < 0) | (codes >= 2**bits)
    if outside.any():
        where = outside.nonzero()[0].tolist()
        raise InputError(f"{name}{where} = {int(signed[tuple(where)])} does not fit into {bits} bits")
    return codes.to(torch.uint8)


def _scale_layout(
    arguments: Arguments, out_features: int, in_features: int
) -> tuple[Granularity, tuple[int, int] | None, list[tuple[int, ...]]]:
    """(granularity, block shape, the shapes that weight_scale may have)."""
    if arguments.strategy == "tensor":
        return "tensor", None, [(1,), (), (1, 1)]
    if arguments.strategy == "channel":
        return "channel", None, [(out_features, 1), (out_features,)]
    block = arguments.block_structure or (1, arguments.group_size or in_features)
    return "block", block, [(math.ceil(out_features / block[0]), math.ceil(in_features / block[1]))]


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Inverse of `unsigned`."""
    return codes.to(torch.int16).sub(2 ** (bits - 1)).to(torch.int8).contiguous()
