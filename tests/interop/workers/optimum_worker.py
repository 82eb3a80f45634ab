"""optimum loads, or quantizes and saves, a GPTQ checkpoint; its layers are GPTQModel's.

`settings`: those of its GPTQQuantizer.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from exchange import calibration_ids, forward, serve, used_weights
from optimum.gptq import GPTQQuantizer, load_quantized_model  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load(request: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(request["checkpoint"])
    del config.quantization_config  # it looks for quantize_config.json then, as for a model that it saved itself
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.tie_weights()
    model = load_quantized_model(
        model, request["checkpoint"], quant_config_name="quantize_config.json", device_map={"": "cpu"},
        backend="gptq_torch",
    )  # fmt: skip
    weights = used_weights(model, lambda layer: hasattr(layer, "qweight"), torch.float16)
    layers = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "qweight")}
    return weights, forward(model, request["token_ids"]), {"layer": sorted(layers)}


def save(request: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(request["source"])
    texts = [tokenizer.decode(ids[0]) for ids in calibration_ids(request)]
    quantizer = GPTQQuantizer(dataset=texts, model_seqlen=64, **request["settings"])
    quantizer.save(quantizer.quantize_model(model, tokenizer), request["checkpoint"], safe_serialization=True)
    return load(request)


if __name__ == "__main__":
    serve(load, save)
