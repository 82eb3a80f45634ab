"""llm-compressor quantizes and saves a compressed-tensors checkpoint.

`settings`: `scheme`, one of its presets. The weights are compressed-tensors' own rounded ones.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from exchange import serve
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def load(request: dict[str, Any]) -> Any:
    raise SystemExit("llm-compressor loads through transformers")


def save(request: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=torch.float32)
    recipe = QuantizationModifier(targets="Linear", scheme=request["settings"]["scheme"], ignore=["lm_head"])
    oneshot(model=model, recipe=recipe)
    weights = {
        name: rounded_weight(layer)
        for name, layer in model.named_modules()
        if getattr(getattr(layer, "quantization_scheme", None), "weights", None) is not None
    }
    model.save_pretrained(request["checkpoint"], save_compressed=True)
    return weights, None, {}


def rounded_weight(layer: Any) -> torch.Tensor:
    with torch.no_grad():
        weight: torch.Tensor = fake_quantize(
            layer.weight.data,
            layer.weight_scale,
            getattr(layer, "weight_zero_point", None),
            layer.quantization_scheme.weights,
            global_scale=getattr(layer, "weight_global_scale", None),
        )
    return weight


if __name__ == "__main__":
    serve(load, save)
