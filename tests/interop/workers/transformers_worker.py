"""transformers loads, or quantizes and saves, a checkpoint, with the quantization libraries installed beside it.

`settings`: `method` is the quantization_config's class ("BitsAndBytesConfig"), `arguments` its arguments (names of
dtypes as "torch.float16"), `dtype` that of the model, `load_arguments` those of a config for loading, if any, and
`rounded_to` the dtype of scales, to which weights are rounded while loading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from exchange import forward, serve, used_weights
from transformers import AutoModelForCausalLM


def main() -> None:
    serve(load, save)


def load(request: dict[str, Any]) -> Any:
    settings = request["settings"]
    config = quantization_config(settings, "load_arguments")
    return answer(model_from(request["checkpoint"], settings, config), request)


def save(request: dict[str, Any]) -> Any:
    settings = request["settings"]
    model = model_from(request["source"], settings, quantization_config(settings, "arguments"))
    model.save_pretrained(request["checkpoint"])  # before any forward, in which bitsandbytes re-lays its weights
    return answer(model, request)


def model_from(path: str, settings: dict[str, Any], config: Any) -> Any:
    if settings.get("method") == "BitsAndBytesConfig":
        import bitsandbytes as bnb

        bnb.nn.modules.has_avx512bf16 = lambda: False  # its fused kernel computes in bfloat16 whatever is asked for
    options: dict[str, Any] = {"quantization_config": config} if config is not None else {}
    if path.endswith(".gguf"):
        path, options["gguf_file"] = str(Path(path).parent), Path(path).name
    if settings.get("device_map", "cpu"):
        options["device_map"] = "cpu"
    dtype = getattr(torch, settings.get("dtype", "float32"))
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options).eval()


def quantization_config(settings: dict[str, Any], key: str) -> Any:
    if key not in settings:
        return None
    arguments = {name: named(value) for name, value in settings[key].items()}
    return getattr(transformers, settings["method"])(**arguments)


def named(value: Any) -> Any:
    return getattr(torch, value[6:]) if isinstance(value, str) and value.startswith("torch.") else value


def answer(model: Any, request: dict[str, Any]) -> Any:
    settings = request["settings"]
    dtype = getattr(torch, settings.get("dtype", "float32"))
    if settings.get("weights") == "dequantize":  # before the forward
        return dequantized(model), forward(model, request["token_ids"]), {}
    logits = forward(model, request["token_ids"])
    if settings.get("weights") == "plain":  # dequantized while loading, or in the first forward
        rounded_to = getattr(torch, settings.get("rounded_to", "float32"))
        layers = {name: layer for name, layer in model.named_modules() if is_matrix(name, layer)}
        return {name: layer.weight.data.to(rounded_to) for name, layer in layers.items()}, logits, {}
    if settings.get("weights") == "unseen":  # a fused kernel has them in a layout of its own
        return {}, logits, {}
    return used_weights(model, is_quantized, dtype), logits, {}


def is_matrix(name: str, layer: Any) -> bool:
    return name.endswith(("_proj", "lm_head", "embed_tokens")) and hasattr(layer, "weight")


def is_quantized(layer: Any) -> bool:
    """Of a class that some quantization put in a plain linear layer's place."""
    return hasattr(layer, "in_features") and type(layer) is not torch.nn.Linear


def dequantized(model: Any) -> dict[str, torch.Tensor]:
    """bitsandbytes' own dequantization: its 8-bit layers round their inputs too, so that the identity would not do."""
    import bitsandbytes as bnb

    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            state = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
            weights[name] = layer.weight.data * state[:, None] * (1 / 127)
    return weights


if __name__ == "__main__":
    main()
