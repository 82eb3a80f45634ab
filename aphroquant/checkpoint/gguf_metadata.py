"""The metadata of a GGUF file from a model's config.json, for llama.cpp's architectures of the same shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aphroquant.checkpoint.gguf_header import PlacedTensor, Value
from aphroquant.errors import UsageError
from aphroquant.models.rope import inverse_frequencies
from aphroquant.models.spec import DecoderSpec, RopeSpec

# Mistral is Llama to llama.cpp, and has its order of q and k rows.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# What general.file_type calls the type that most weights have; informative only.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "MXFP4": 38, "NVFP4": 39,
}  # fmt: skip
_MEDIUM = {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17}  # of these with a larger type among them
_QUANTIZATION_VERSION = 2
_ANY_HEAD_DIM = 64  # YaRN's attention factor does not depend on it


def architecture_of(spec: DecoderSpec) -> str:
    """llama.cpp's name for this family. UsageError if it has none for this variant."""
    if spec.family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"GGUF files can be written of {known}, not of {spec.family}")
    architecture = ARCHITECTURES[spec.family]
    if architecture == "qwen3" and (spec.qkv_bias or spec.o_bias):
        raise UsageError("llama.cpp's qwen3 has no attention biases, and this model has")
    if architecture == "qwen2" and spec.num_heads * spec.head_dim != spec.hidden_size:
        channels = spec.hidden_size // spec.num_heads
        raise UsageError(
            f"llama.cpp's qwen2 needs heads of hidden_size / num_attention_heads = {channels} channels, "
            f"and this model's have {spec.head_dim}"
        )
    return architecture


def model_metadata(spec: DecoderSpec, name: str, tensors: Mapping[str, PlacedTensor]) -> dict[str, Value]:
    """general.* and the architecture's own keys."""
    architecture = architecture_of(spec)
    values: dict[str, Value] = {
        "block_count": spec.num_layers,
        "context_length": _context_length(spec),
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "vocab_size": spec.vocab_size,
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope.theta),
        **_rope_scaling(spec.rope),
    }
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _file_type(tensors),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }


def rope_factors(spec: DecoderSpec) -> Tensor | None:
    """float32 [head_dim / 2]: what llama.cpp divides the frequencies by, for Llama 3's scaling; None for others."""
    if spec.rope.kind != "llama3":
        return None
    plain = inverse_frequencies(RopeSpec(spec.rope.theta), spec.head_dim)[0].double()
    scaled = inverse_frequencies(spec.rope, spec.head_dim)[0].double()
    return (plain / scaled).float()


def _context_length(spec: DecoderSpec) -> int:
    """Of a model with sliding windows, which these architectures lack, as much as no window cuts."""
    windows = [window for window in spec.sliding_windows if window is not None]
    return min([spec.max_position_embeddings, *windows])


def _rope_scaling(rope: RopeSpec) -> dict[str, Value]:
    parameters: Mapping[str, Any] = rope.parameters
    if rope.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if rope.kind != "yarn":  # Llama 3's is a tensor
        return {}
    _check_yarn(rope)
    values: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(parameters["factor"]),
        "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
    }
    for key in ("beta_fast", "beta_slow"):
        if parameters.get(key) is not None:
            values[f"rope.scaling.yarn_{key}"] = float(parameters[key])
    return values


def _check_yarn(rope: RopeSpec) -> None:
    """Refuse what llama.cpp computes otherwise: it has one attention factor for each factor, and rounds the bounds."""
    factor = float(rope.parameters["factor"])
    expected = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    found = inverse_frequencies(rope, _ANY_HEAD_DIM)[1]
    if not math.isclose(found, expected, rel_tol=1e-6) or rope.parameters.get("truncate") is False:
        raise UsageError(f"GGUF has no keys for these YaRN parameters: {dict(rope.parameters)}")


def _file_type(tensors: Mapping[str, PlacedTensor]) -> int:
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        if len(tensor.shape) > 1:
            weights[tensor.block_type.name] += int(torch.Size(tensor.shape).numel())
    (most, _), *rest = weights.most_common() or [("F32", 0)]
    larger = any(name in ("Q5_K", "Q6_K", "Q8_0") for name, _ in rest)
    return _MEDIUM[most] if most in _MEDIUM and larger else _FILE_TYPES[most]
