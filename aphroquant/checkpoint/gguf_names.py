"""Names and row order of a model's tensors: Hugging Face's and llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aphroquant.errors import InputError

ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp pairs neighbouring channels in its rotation for these; Hugging Face pairs the two halves of a head.
PERMUTED = ("llama",)

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_BACK = {theirs: ours for ours, theirs in _TOP.items()}
_IN_BLOCK_BACK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)", re.ASCII)
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a tensor of a GGUF file; a name with no counterpart stays."""
    stem, _, suffix = name.rpartition(".")
    if match := _BLOCK.fullmatch(stem):
        if match[2] in _IN_BLOCK:
            return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{suffix}"
    elif stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    return name


def gguf_name(name: str) -> str | None:
    """The name in a GGUF file of a tensor with that Hugging Face name; None if there is none."""
    stem, _, suffix = name.rpartition(".")
    if match := _LAYER.fullmatch(stem):
        return f"blk.{match[1]}.{_IN_BLOCK_BACK[match[2]]}.{suffix}" if match[2] in _IN_BLOCK_BACK else None
    return f"{_TOP_BACK[stem]}.{suffix}" if stem in _TOP_BACK else None


def permuted_heads(name: str, config: Mapping[str, Any], architecture: str) -> int | None:
    """How many heads the rows of this tensor (Hugging Face name) are, if llama.cpp orders them differently."""
    if architecture not in PERMUTED:
        return None
    key = _HEADS.get(name.rpartition(".")[0].rpartition(".")[2])
    if key is None:
        return None
    heads = config.get(key, config["num_attention_heads"])
    return int(heads)


def unpermuted_rows(name: str, num_rows: int, num_heads: int) -> Tensor:
    """Index [N] that brings the rows of the q or k projection `name` from llama.cpp's order into Hugging Face's.

    llama.cpp stores the channels of a head as 0, d/2, 1, d/2 + 1, ... so that rotated pairs are neighbours.
    """
    _check_rows(name, num_rows, num_heads)
    rows = torch.arange(num_rows).view(num_heads, num_rows // num_heads // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


def permuted_rows(name: str, num_rows: int, num_heads: int) -> Tensor:
    """The inverse of `unpermuted_rows`: from Hugging Face's order into llama.cpp's."""
    _check_rows(name, num_rows, num_heads)
    rows = torch.arange(num_rows).view(num_heads, 2, num_rows // num_heads // 2)
    return rows.transpose(1, 2).reshape(-1)


def _check_rows(name: str, num_rows: int, num_heads: int) -> None:
    if num_rows % (2 * num_heads):
        raise InputError(f"{name} has {num_rows} rows, which do not fit {num_heads} heads")
