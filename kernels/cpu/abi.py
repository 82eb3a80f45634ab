"""The structs of the C ABI as ctypes sees them: the same fields in the same order as src/abi.h."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint32, c_void_p, sizeof
from typing import Any

import torch
from torch import Tensor

DENSE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KIND_CODES, KIND_FP8 = 3, 4
INPUT_NONE, INPUT_INT_CHUNK, INPUT_INT_ROW, INPUT_INT_STATIC, INPUT_INT_GROUP = range(5)
INPUT_FP8_ROW, INPUT_FP8_STATIC, INPUT_FP8_GROUP = range(5, 8)
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ZEROS_U8, OFFSETS = 0, 1
CACHE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}


class LinearStruct(Structure):
    """AqLinear."""

    _fields_ = (
        ("kind", c_int32),
        ("bits", c_int32),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("padded_in", c_int64),
        ("chunk_len", c_int64),
        ("num_chunks", c_int64),
        ("num_groups", c_int64),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("chunk_groups", c_void_p),
        ("columns", c_void_p),
        ("bias", c_void_p),
        ("table", c_void_p),
        ("scale_type", c_int32),
        ("offset_kind", c_int32),
        ("integer_dot", c_int32),
        ("input_kind", c_int32),
        ("input_levels", c_int32),
        ("input_group", c_int32),
        ("input_scale", c_float),
        ("reserved", c_int32),
    )


class LayerStruct(Structure):
    """AqLayer."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", LinearStruct * 3),
        ("num_qkv", c_int32),
        ("num_gate_up", c_int32),
        ("o", LinearStruct),
        ("gate_up", LinearStruct * 2),
        ("down", LinearStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("sliding_window", c_int64),
    )


class DecoderStruct(Structure):
    """AqDecoder."""

    _fields_ = (
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab_size", c_int64),
        ("block_size", c_int64),
        ("norm_eps", c_float),
        ("softmax_scale", c_float),
        ("key_type", c_int32),
        ("value_type", c_int32),
        ("layers", POINTER(LayerStruct)),
        ("embedding", POINTER(LinearStruct)),
        ("head", POINTER(LinearStruct)),
        ("final_norm", c_void_p),
    )


class BatchStruct(Structure):
    """AqBatch."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("max_blocks", c_int64),
        ("num_logits", c_int64),
        ("max_context", c_int64),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("slot_mapping", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("logits_rows", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class RoundingStruct(Structure):
    """AqRounding."""

    _fields_ = (
        ("weight", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("group_size", c_int64),
        ("weight_type", c_int32),
        ("scale_type", c_int32),
        ("bits", c_int32),
        ("symmetric", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("error", c_double),
        ("total", c_double),
    )


class Float8RoundingStruct(Structure):
    """AqFloat8Rounding."""

    _fields_ = (
        ("weight", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("block_rows", c_int64),
        ("block_columns", c_int64),
        ("weight_type", c_int32),
        ("scales_given", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("error", c_double),
        ("total", c_double),
    )


_STRUCTS = (LinearStruct, LayerStruct, DecoderStruct, BatchStruct, RoundingStruct, Float8RoundingStruct)
# What aq_abi_version() gives: AQ_ABI_VERSION and the sizes of the structs.
ABI_VERSION = 2 * 65536 + sum(sizeof(struct) for struct in _STRUCTS)


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous CPU tensor's data begin; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()


def aligned_bytes(num_bytes: int) -> Tensor:
    """Uninitialized uint8 memory that starts at a multiple of 64."""
    memory = torch.empty(num_bytes + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + num_bytes]


def signatures() -> dict[str, tuple[Any, list[Any]]]:
    """Result and argument types of every exported function."""
    linear, decoder, batch = POINTER(LinearStruct), POINTER(DecoderStruct), POINTER(BatchStruct)
    pointer = c_void_p
    return {
        "aq_linear_workspace": (c_int64, [linear, c_int64, c_int32]),
        "aq_linear": (None, [linear, pointer, c_int64, pointer, pointer, c_int32]),
        "aq_decoder_workspace": (c_int64, [decoder, batch, c_int32]),
        "aq_decoder_forward": (None, [decoder, batch, pointer, pointer, c_int32]),
        "aq_attention": (None, [decoder, batch, pointer, pointer, pointer, c_int32]),
        "aq_store": (None, [decoder, batch, pointer, pointer]),
        "aq_unpack": (None, [pointer, c_int64, c_int64, c_int64, c_int32, pointer]),
        "aq_unpack_across": (None, [pointer, c_int64, c_int64, c_int32, pointer]),
        "aq_unpack_awq": (None, [pointer, c_int64, c_int64, pointer]),
        "aq_pack": (c_int32, [pointer, c_int64, c_int64, c_int32, pointer]),
        "aq_pack_across": (c_int32, [pointer, c_int64, c_int64, c_int32, pointer]),
        "aq_pack_awq": (c_int32, [pointer, c_int64, c_int64, pointer]),
        "aq_largest_masked": (c_uint32, [pointer, c_int64, c_int32, c_uint32]),
        "aq_round_integers": (c_int32, [POINTER(RoundingStruct)]),
        "aq_round_float8": (None, [POINTER(Float8RoundingStruct)]),
    }
