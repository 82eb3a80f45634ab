"""config.json of the model in a GGUF file, from the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aphroquant.checkpoint.gguf_names import ROPE_FACTORS
from aphroquant.checkpoint.gguf_reader import GgufTensor
from aphroquant.errors import InputError
from aphroquant.models.rope import inverse_frequencies
from aphroquant.models.spec import RopeSpec
from aphroquant.schemes import DenseScheme

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Llama 3's published values; the file has only the factors that follow from them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXTS = 1.0, 4.0, (8192, 4096, 16384, 32768, 2048)


def hugging_face_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], rope_factors: Tensor | None
) -> dict[str, Any]:
    """config.json of the model in the file. InputError naming the metadata key that is missing or not supported."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in CLASSES:
        known = ", ".join(CLASSES)
        raise InputError(f"general.architecture {architecture!r} is not supported; known are {known}")
    read = _Keys(metadata, architecture)
    heads, hidden = read.integer("attention.head_count"), read.integer("embedding_length")
    if hidden % heads and not read.has("attention.key_length"):
        raise InputError(f"{architecture}.embedding_length {hidden} is no multiple of the {heads} heads")
    head_dim = read.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.integer(key, head_dim) != head_dim:
            raise InputError(f"{architecture}.{key} = {read.integer(key)} differs from the head size {head_dim}")
    config: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": _dtype(tensors),
        "vocab_size": _vocab_size(metadata, tensors),
        "hidden_size": hidden,
        "intermediate_size": read.integer("feed_forward_length"),
        "num_hidden_layers": read.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": read.integer("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        **_rope(read, head_dim, rope_factors),
        **_token_ids(metadata),
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    if architecture == "qwen3":
        config["attention_bias"] = False
    return config


class _Keys:
    """Metadata of one architecture, with types checked."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.prefix = architecture

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one value a layer, all the same
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            raise InputError(f"{self.prefix}.{key} = {value!r} must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, float | int) or not 0 < value < float("inf"):
            raise InputError(f"{self.prefix}.{key} = {value!r} must be a positive number")
        return float(str(np.float32(value)))  # 1e-05, which the file holds as the nearest float32


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """The dtype to compute in: that of dense matrices, float16 where they are quantized with float16 scales."""
    schemes = {tensor.block_type.scheme for tensor in tensors.values() if len(tensor.shape) == 2}
    if not all(isinstance(scheme, DenseScheme) for scheme in schemes):
        return "float16"
    return str(schemes.pop()) if len(schemes) == 1 else "float32"


def _vocab_size(metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError("token_embd.weight is missing or no matrix")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > embedding.shape[0]:
        raise InputError(f"token_embd.weight has {embedding.shape[0]} rows for {len(tokens)} tokens")
    return embedding.shape[0]


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in names.items()}
    return {name: value if type(value) is int else None for name, value in found.items()}  # the tokenizer tells of it


def _rope(read: _Keys, head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    """rope_theta and rope_scaling, the spelling that every version of transformers reads."""
    theta = read.number("rope.freq_base", 10000.0)
    kind = "none" if read.get("rope.scaling.type") is None else read.get("rope.scaling.type")
    if not isinstance(kind, str):
        raise InputError(f"{read.prefix}.rope.scaling.type = {kind!r} must be a string")
    if factors is not None:
        return {"rope_theta": theta, "rope_scaling": _llama3_scaling(factors, theta, head_dim)}
    if kind == "none" and read.has("rope.scale_linear"):
        return {"rope_theta": theta, "rope_scaling": _linear(read.number("rope.scale_linear"))}
    if kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": _linear(read.number("rope.scaling.factor"))}
    if kind != "yarn":
        raise InputError(f"{read.prefix}.rope.scaling.type {kind!r} is not supported; known are none, linear, yarn")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": read.number("rope.scaling.factor"),
        "original_max_position_embeddings": read.integer("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        if read.has(f"rope.scaling.yarn_{key}"):
            scaling[key] = read.number(f"rope.scaling.yarn_{key}")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if read.number(f"rope.scaling.{key}", 1.0) != 1.0:
            raise InputError(f"{read.prefix}.rope.scaling.{key} = {read.get(f'rope.scaling.{key}')} is not supported")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _linear(factor: float) -> dict[str, Any] | None:
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _llama3_scaling(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 scaling from which the stored divisors of the frequencies follow; None if they are all one."""
    if factors.shape != (head_dim // 2,):
        raise InputError(f"{ROPE_FACTORS} has shape {list(factors.shape)}, expected [{head_dim // 2}]")
    if bool((factors == 1).all()):
        return None
    unscaled, _ = inverse_frequencies(RopeSpec(theta), head_dim)
    for context in _LLAMA3_CONTEXTS:
        parameters = {
            "factor": float(factors.max()),
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": context,
        }
        scaled, _ = inverse_frequencies(RopeSpec(theta, "llama3", parameters), head_dim)
        if torch.allclose(unscaled / scaled, factors, rtol=1e-4, atol=0):
            return {"rope_type": "llama3", **parameters}
    raise InputError(f"{ROPE_FACTORS} follows no known scaling (Llama 3's with 1, 4 and {_LLAMA3_CONTEXTS} was tried)")
