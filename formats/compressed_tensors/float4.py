"""nvfp4-pack-quantized and mxfp4-pack-quantized: four-bit floats, two a byte, the first in the low nibble.

both:   P.weight_packed uint8 [N, K/2]
NVFP4:  P.weight_scale float8_e4m3fn [N, K/16]    P.weight_global_scale float32 [1], by which scales are divided
        P.input_global_scale float32 [1], the same for inputs, unless they are left alone
MXFP4:  P.weight_scale uint8 [N, K/32], exponents biased by 127
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.formats import fp4, writing
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.compressed_tensors.config import NVFP4, Group
from aphroquant.schemes import ActivationScheme, LookupScheme, QuantizedWeight

NVFP4_BLOCK, MXFP4_BLOCK = 16, 32
NVFP4_INPUT_SCHEME = ActivationScheme("float", 4, granularity="group", group_size=NVFP4_BLOCK)


def holds(scheme: LookupScheme) -> bool:
    """Whether there is a layout for it: NVFP4 or MXFP4, with inputs left alone or quantized as they come."""
    kind = (scheme.table, scheme.block_size, scheme.scales, scheme.flattened)
    if kind not in (("e2m1", NVFP4_BLOCK, "e4m3", False), ("e2m1", MXFP4_BLOCK, "e8m0", False)):
        return False
    if scheme.has_input_scale:
        return scheme.activations == NVFP4_INPUT_SCHEME
    return scheme.activations is None or scheme.activations.kind == "float"


def scheme(module: str, group: Group, headers: Mapping[str, TensorHeader]) -> LookupScheme:
    shape = fp4.require_packed(module, headers, "weight_packed")
    if group.format != NVFP4:
        fp4.require_block_scales(module, headers, "weight_scale", fp4.EXPONENTS, shape, MXFP4_BLOCK)
        return LookupScheme("e2m1", MXFP4_BLOCK, "e8m0", activations=group.activations())
    fp4.require_block_scales(module, headers, "weight_scale", (torch.float8_e4m3fn,), shape, NVFP4_BLOCK)
    fp4.require_number(module, headers, "weight_global_scale")
    found = LookupScheme("e2m1", NVFP4_BLOCK, "e4m3", activations=group.activations())
    if found.has_input_scale:
        fp4.require_number(module, headers, "input_global_scale")
    return found


def read(module: str, group: Group, tensors: Mapping[str, Tensor], expected: LookupScheme) -> QuantizedWeight:
    codes, scales = fp4.unpack_nibbles(tensors["weight_packed"]), tensors["weight_scale"]
    canonical = {"codes": codes, "scales": scales if group.format == NVFP4 else fp4.exponent_scales(scales)}
    for name, stored in (("global_scale", "weight_global_scale"), ("input_scale", "input_global_scale")):
        if name in expected.shapes(*codes.shape):
            canonical[name] = fp4.factor_of_divisor(module, stored, tensors[stored])
    return QuantizedWeight(expected, canonical, (codes.shape[0], codes.shape[1]))


def write(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Global scales of other formats may be factors, whose reciprocals are rounded; see `fp4`."""
    assert isinstance(weight.scheme, LookupScheme)
    target = "compressed-tensors"
    writing.require_multiple(target, module, "in_features", weight.shape[1], weight.scheme.block_size)
    scales = weight["scales"].contiguous()
    tensors = {
        "weight_packed": fp4.pack_nibbles(weight["codes"]),
        "weight_scale": scales.view(torch.uint8) if weight.scheme.scales == "e8m0" else scales,
    }
    for name, stored in (("global_scale", "weight_global_scale"), ("input_scale", "input_global_scale")):
        if name in weight.tensors:
            tensors[stored] = fp4.stored_divisor(target, module, name, weight[name]).reshape(1)
    return tensors
