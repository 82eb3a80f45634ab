"""AutoRound quantizes and saves a checkpoint in one of its layouts; transformers loads one through it.

`settings`: `layout` ("auto_round", "auto_round:auto_awq", "auto_gptq", ...) and those of its AutoRound. No iterations:
the numbers are those of rounding to nearest, the files the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from auto_round.export.export_to_awq.utils import dequantize_gemm  # type: ignore[import-not-found]
from exchange import forward, serve, used_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(request: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.float16, device_map="cpu").eval()
    return answer(model, request)


def answer(model: Any, request: dict[str, Any]) -> Any:
    weights = used_weights(model, lambda layer: hasattr(layer, "qweight"), torch.float16)
    weights = {name: weight.reshape(weight.shape[0], -1) for name, weight in weights.items()}
    return weights, forward(model, request["token_ids"]), {}


def save(request: dict[str, Any]) -> Any:
    settings = dict(request["settings"])
    layout = settings.pop("layout")
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(request["source"])
    rounding = AutoRound(model, tokenizer, iters=0, disable_opt_rtn=True, device_map="cpu", **settings)
    rounding.quantize_and_save(request["checkpoint"], format=layout)
    place = Path(request["checkpoint"])
    if not (place / "config.json").exists():  # it adds a folder of its own
        inner = next(place.glob("*/config.json")).parent
        for path in inner.iterdir():
            path.rename(place / path.name)
    if layout == "auto_round" and not packed_as_awq(place):
        return load(request)
    return unpacked(place), None, {}  # its loader needs other libraries for these, or a GPU


def unpacked(place: Path) -> dict[str, torch.Tensor]:
    """The weights of AWQ's packing, by AutoRound's own unpacking."""
    tensors = load_file(place / "model.safetensors")
    settings = json.loads((place / "config.json").read_text())["quantization_config"]
    return {
        name.removesuffix(".qweight"): dequantize_gemm(
            *(tensors[name.replace("qweight", part)] for part in ("qweight", "qzeros", "scales")),
            settings["bits"],
            settings["group_size"],
        ).T
        for name in tensors
        if name.endswith(".qweight")
    }


def packed_as_awq(place: Path) -> bool:
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    return "auto_awq" in config.get("packing_format", "")


if __name__ == "__main__":
    serve(load, save)
