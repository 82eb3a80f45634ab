"""The hqq package quantizes and saves a checkpoint, and its layers take one's tensors.

`settings`: those of its BaseQuantizeConfig. Its save_quantized writes pickle files, which we refuse. Its
save_to_safetensors has settings in each layer and none in config.json, so the worker puts transformers' there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from exchange import forward, serve
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # type: ignore[import-not-found]
from hqq.models.hf.base import AutoHQQHFModel  # type: ignore[import-not-found]
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def load(request: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(request["checkpoint"])
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_file(Path(request["checkpoint"]) / "model.safetensors")
    names = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
    for name in names:
        layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        keys = [key for key in tensors if key.startswith(f"{name}.")]
        layer.load_state_dict({key.removeprefix(f"{name}."): tensors.pop(key) for key in keys})
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.load_state_dict(tensors, strict=False)
    return answer(model, request)


def save(request: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=torch.float32).eval()
    config = BaseQuantizeConfig(**request["settings"])
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    place = Path(request["checkpoint"])
    AutoHQQHFModel.save_to_safetensors(model, str(place), num_blocks_per_file=1000)
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    (place / "config.json").write_text(json.dumps(settings, default=str))
    return answer(model, request)


def answer(model: Any, request: dict[str, Any]) -> Any:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HQQLinear)}
    weights = {name: layer.dequantize().detach() for name, layer in layers.items()}
    return weights, forward(model, request["token_ids"]), {}


if __name__ == "__main__":
    serve(load, save)
