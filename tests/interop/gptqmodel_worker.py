"""Runs in GPTQModel's environment: what it makes of a checkpoint, against a reference file. Prints one line of JSON.

    python gptqmodel_worker.py CHECKPOINT REFERENCE.safetensors

A layer's weight is what its kernel gives for the identity matrix, so that packing, zero points, groups and their order
are all judged as they are used. The plain torch kernel is asked for: the fused ones of CPUs compute in bfloat16.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def main(checkpoint: str, reference_path: str) -> None:
    reference = load_file(reference_path)
    token_ids, expected = reference.pop("interop.token_ids"), reference.pop("interop.logits")
    config = AutoConfig.from_pretrained(checkpoint)
    settings = config.quantization_config
    backend = BACKEND.AWQ_TORCH if settings["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(checkpoint, device="cpu", dtype=torch.float16, backend=backend).model
    own = difference(loaded, token_ids, expected)
    layers = {name: layer for name, layer in loaded.named_modules() if hasattr(layer, "qweight")}
    weights = {f"{name}.weight": layer_weight(layer) for name, layer in layers.items()}
    result = {
        "kernel": next(type(layer).__name__ for layer in layers.values()),
        "layers": len(layers),
        "equal": sum(torch.equal(weight, reference[name].half()) for name, weight in weights.items()),
        "fp32": difference(dense_model(config, reference, weights), token_ids, expected),
        "own": own,
        "hf": None,
    }
    if not settings.get("dynamic"):  # transformers does not know overrides of single modules
        through_transformers = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cpu")
        result["hf"] = difference(through_transformers, token_ids, expected)
    print(json.dumps(result), flush=True)


def layer_weight(layer: Any) -> torch.Tensor:
    """[N, K] float16, without the bias."""
    bias, layer.bias = layer.bias, None
    with torch.no_grad():
        weight: torch.Tensor = layer(torch.eye(layer.in_features, dtype=torch.float16)).T
    layer.bias = bias
    return weight


def dense_model(config: Any, state: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> Any:
    """A float32 model with the library's weights, and the reference's where nothing is quantized."""
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict({**state, **{name: weight.float() for name, weight in weights.items()}}, strict=False)
    model.tie_weights()
    return model


def difference(model: Any, token_ids: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    with torch.no_grad():
        logits = model(token_ids).logits.float()
    return float((logits - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])
