"""HQQ, which needs no text, with its default settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from exchange import serve
from hqq.core.quantize import BaseQuantizeConfig  # type: ignore[import-not-found]
from hqq.models.hf.base import AutoHQQHFModel  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(request: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32).eval()
    config = BaseQuantizeConfig(nbits=request["bits"], group_size=request["group_size"])
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device=request["device"])
    place = Path(request["out"])
    AutoHQQHFModel.save_to_safetensors(model, str(place), num_blocks_per_file=1000)
    # Its own files have the settings in each layer and none in config.json: transformers' form is put there.
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    (place / "config.json").write_text(json.dumps(settings, default=str))
    AutoTokenizer.from_pretrained(request["base"]).save_pretrained(place)


if __name__ == "__main__":
    serve(quantize, "hqq", "torch")
