"""The decoder forward equals transformers' for every family and every variation that the spec knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.models.streamed import StreamedModel

TinyCheckpoint = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama attention bias": ("llama", {"attention_bias": True}),
    "llama mlp bias": ("llama", {"mlp_bias": True}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama no grouping": ("llama", {"num_key_value_heads": 4}),
    "llama large theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    ),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn without factor": ("llama", {"rope_parameters": {**YARN, "factor": None}}),
    "llama yarn untruncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "llama yarn mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "llama yarn attention factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.2}}),
    "smollm shape": (
        "llama",
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "mistral sliding": ("mistral", {"sliding_window": 7}),
    "mistral window longer than the prompt": ("mistral", {"sliding_window": 4096}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding by layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2 window switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "qwen3": ("qwen3", {}),
    "qwen3 attention bias": ("qwen3", {"attention_bias": True}),
    "qwen3 layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral sliding": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen3 experts": ("qwen3_moe", {**EXPERTS}),
    "qwen3 experts, weights that add up to 1": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "qwen3 experts in every second layer": ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2}),
    "qwen3 experts but for one layer": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1], "attention_bias": True}),
    "qwen3 all experts, sliding": (
        "qwen3_moe",
        {**EXPERTS, "num_experts_per_tok": 6, "use_sliding_window": True, "sliding_window": 5},
    ),
}  # fmt: skip


def theirs(path: Path, windows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(windows).logits
    return logits


def ours(path: Path, windows: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = StreamedModel(open_checkpoint(path), dtype)
    hidden = model.hidden_states(windows)
    return model.logits(hidden.flatten(0, 1)).view(*windows.shape, -1)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tiny_checkpoint: TinyCheckpoint) -> None:
    family, overrides = CASES[case]
    path = tiny_checkpoint(family, **overrides)
    windows = torch.randint(0, 360, (2, 33))
    expected = theirs(path, windows)
    assert expected.std() > 0.1, "logits this flat would agree whatever the forward does"
    worst = float((ours(path, windows) - expected).abs().max())
    assert worst < 1e-4, f"{case}: logits differ by {worst:.2e}"


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"])
def test_float64_forward_agrees_with_float32(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint(family)
    windows = torch.randint(0, 360, (1, 33))
    exact = ours(path, windows, torch.float64)
    assert exact.dtype == torch.float64
    assert float((ours(path, windows) - exact).abs().max()) < 1e-5
