"""NF4 and FP4: codes of the flattened weight, scales of its blocks, and the JSON that says what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import TensorHeader
from aphroquant.formats.fp4 import pack_nibbles, unpack_nibbles
from aphroquant.schemes import TABLES, LookupScheme, QuantizedWeight
from aphroquant.schemes.lookup import NESTED_BLOCK_SIZE, num_blocks

STATE = "weight.quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
MAX_STATE_BYTES = 4096  # the JSON has about 200
MAX_OFFSET = torch.finfo(torch.float32).max
TABLE_TOLERANCE = 1e-4  # releases print FP4's thirds with more or fewer digits


class State(NamedTuple):
    """The JSON beside a four-bit weight."""

    shape: tuple[int, int]
    block_size: int
    nested_offset: float | None


def scheme(module: str, headers: Mapping[str, TensorHeader]) -> LookupScheme:
    """The scheme, from headers alone: the block size follows from the numbers of codes and of scales."""
    kinds = [name.removeprefix(STATE) for name in headers if name.startswith(STATE)]
    if len(kinds) != 1 or kinds[0] not in ("nf4", "fp4"):
        raise InputError(f"{module} is quantized as {' and '.join(kinds)}, but must be either nf4 or fp4")
    dtype, shape = reading.require(module, headers, "weight", STORAGE_DTYPES)
    elements = 2 * dtype.itemsize * math.prod(shape)
    nested = "weight.nested_absmax" in headers
    absmax = (torch.uint8,) if nested else reading.SCALE_DTYPES
    blocks = math.prod(reading.require(module, headers, "weight.absmax", absmax).shape)
    reading.require_shape(module, headers, "weight.absmax", absmax, (blocks,))
    block_size = next((size for size in BLOCK_SIZES if blocks and num_blocks(elements, size) == blocks), None)
    if block_size is None:
        raise InputError(f"{module}.weight.absmax has {blocks} scales, which fit no block size for {elements} codes")
    reading.require_shape(module, headers, "weight.quant_map", (torch.float32,), (16,))
    if nested:
        groups = num_blocks(blocks, NESTED_BLOCK_SIZE)
        reading.require_shape(module, headers, "weight.nested_absmax", (torch.float32,), (groups,))
        reading.require_shape(module, headers, "weight.nested_quant_map", (torch.float32,), (256,))
    table = cast(Literal["nf4", "fp4"], kinds[0])
    return LookupScheme(table, block_size, "nested" if nested else "float", flattened=True)


def read(module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    expected = scheme(module, reading.headers_of(tensors))
    state = _state(f"{module}.{STATE}{expected.table}", tensors[STATE + expected.table], expected)
    packed = tensors["weight"].contiguous().flatten().view(torch.uint8)
    elements, blocks = math.prod(state.shape), tensors["weight.absmax"].shape[0]
    if num_blocks(elements, 2) != packed.shape[0] or num_blocks(elements, state.block_size) != blocks:
        raise InputError(
            f"{module}: quant_state says shape {list(state.shape)} in blocks of {state.block_size}, but weight has "
            f"{packed.shape[0]} bytes and absmax {blocks} scales"
        )
    table = expected.table_values()
    if not torch.allclose(tensors["weight.quant_map"], table, rtol=0, atol=TABLE_TOLERANCE):
        raise InputError(f"{module}.weight.quant_map is not the table of {expected.table}")
    codes = unpack_nibbles(packed, low_first=False)[:elements].reshape(state.shape)
    absmax = tensors["weight.absmax"]
    canonical = {"codes": codes, "scales": absmax if expected.scales == "nested" else absmax.float()}
    if expected.scales == "nested":
        canonical["nested_table"] = tensors["weight.nested_quant_map"]
        canonical["nested_scales"] = tensors["weight.nested_absmax"]
        canonical["nested_offset"] = torch.tensor(state.nested_offset, dtype=torch.float32)
    return QuantizedWeight(expected, canonical, state.shape)


def write(module: str, weight: QuantizedWeight, dtype: str) -> dict[str, Tensor]:
    """`dtype` is what the library dequantizes to."""
    scheme = weight.scheme
    assert isinstance(scheme, LookupScheme)
    zero = TABLES[scheme.table].index(0.0)
    codes = torch.nn.functional.pad(weight["codes"].flatten(), (0, weight["codes"].numel() % 2), value=zero)
    state: dict[str, Any] = {"quant_type": scheme.table, "blocksize": scheme.block_size, "dtype": dtype}
    state["shape"] = list(weight.shape)
    tensors = {"weight": pack_nibbles(codes, low_first=False)[:, None], "weight.quant_map": scheme.table_values()}
    if scheme.scales == "nested":
        state["nested_blocksize"] = NESTED_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(weight["nested_offset"])
        tensors["weight.absmax"] = weight["scales"]
        tensors["weight.nested_absmax"] = weight["nested_scales"]
        tensors["weight.nested_quant_map"] = weight["nested_table"]
    else:
        tensors["weight.absmax"] = writing.exact_cast("bitsandbytes", module, "scales", weight["scales"], torch.float32)
    tensors[STATE + scheme.table] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def _state(name: str, stored: Tensor, scheme: LookupScheme) -> State:
    """The JSON of a quant_state, every value checked. Nothing is allocated from it before that."""
    if stored.dtype != torch.uint8 or stored.ndim != 1 or stored.shape[0] > MAX_STATE_BYTES:
        raise InputError(f"{name} must be the bytes of a JSON object, at most {MAX_STATE_BYTES}")
    try:
        state = json.loads(bytes(stored.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise InputError(f"{name} must be a JSON object, not {type(state).__name__}")
    shape, block_size = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise InputError(f"{name}: shape = {_brief(shape)} must be two positive integers")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise InputError(f"{name}: blocksize = {_brief(block_size)} must be one of {', '.join(map(str, BLOCK_SIZES))}")
    if state.get("quant_type") != scheme.table:
        raise InputError(f"{name}: quant_type = {_brief(state.get('quant_type'))} contradicts the tensor's name")
    offset = _nested_offset(name, state) if scheme.scales == "nested" else None
    return State((shape[0], shape[1]), block_size, offset)


def _nested_offset(name: str, state: Mapping[str, Any]) -> float:
    if state.get("nested_blocksize") != NESTED_BLOCK_SIZE or state.get("nested_dtype") != "float32":
        raise InputError(f"{name}: nested_blocksize and nested_dtype must be {NESTED_BLOCK_SIZE} and 'float32'")
    offset = state.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not abs(offset) < MAX_OFFSET:
        raise InputError(f"{name}: nested_offset = {_brief(offset)} must be a finite number")
    return float(offset)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
