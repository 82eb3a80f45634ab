"""GPTQModel loads, or quantizes and saves, a GPTQ or AWQ checkpoint.

The plain torch kernel is asked for: the fused ones of CPUs compute in bfloat16.
`settings`: those of its QuantizeConfig; `quant_method` "awq" or "gptq".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from exchange import calibration_ids, forward, serve, used_weights
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # type: ignore[import-not-found]


def load(request: dict[str, Any]) -> Any:
    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())["quantization_config"]
    backend = BACKEND.AWQ_TORCH if config["quant_method"] == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(request["checkpoint"], device="cpu", dtype=torch.float16, backend=backend).model
    weights = used_weights(model, lambda layer: hasattr(layer, "qweight"), torch.float16)
    layers = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "qweight")}
    return weights, forward(model, request["token_ids"]), {"layer": sorted(layers)}


def save(request: dict[str, Any]) -> Any:
    settings = request["settings"]
    backend = BACKEND.AWQ_TORCH if settings.get("quant_method") == "awq" else BACKEND.GPTQ_TORCH
    model = GPTQModel.load(request["source"], QuantizeConfig(**settings), device="cpu")
    rows = [{"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]} for ids in calibration_ids(request)]
    model.quantize(rows, batch_size=1, backend=backend)
    model.save(request["checkpoint"])
    return load(request)


if __name__ == "__main__":
    serve(load, save)
