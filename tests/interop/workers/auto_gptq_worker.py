"""AutoGPTQ loads, or quantizes and saves, a GPTQ checkpoint, with the torch code of its kernel for old files.

Shims: its quantizer refuses to start without a CUDA device and then waits for that device, although every step runs on
a CPU as well; so it is told of one, which is the CPU, and the waiting does nothing.
`settings`: those of its BaseQuantizeConfig.
"""

from __future__ import annotations

from typing import Any

import auto_gptq.modeling._base
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # type: ignore[import-not-found]
from exchange import calibration_ids, forward, serve, used_weights

torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]
torch.cuda.empty_cache = lambda: None
auto_gptq.modeling._base.CUDA_0 = torch.device("cpu")


def load(request: dict[str, Any]) -> Any:
    model = AutoGPTQForCausalLM.from_quantized(
        request["checkpoint"], device="cpu", torch_dtype=torch.float16, disable_exllama=True, disable_exllamav2=True
    ).model
    return answer(model, request)


def save(request: dict[str, Any]) -> Any:
    config = BaseQuantizeConfig(**request["settings"])
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    model = AutoGPTQForCausalLM.from_pretrained(request["source"], config, torch_dtype=torch.float16)
    torch.cuda.is_available = lambda: False  # type: ignore[method-assign]
    ids = calibration_ids(request)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids])
    model.save_quantized(request["checkpoint"], use_safetensors=True)
    found = AutoGPTQForCausalLM.from_quantized(
        request["checkpoint"], device="cpu", torch_dtype=torch.float16, disable_exllama=True, disable_exllamav2=True
    ).model
    return answer(found, request)


def answer(model: Any, request: dict[str, Any]) -> Any:
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "qweight")}
    weights = used_weights(model, lambda layer: hasattr(layer, "qweight"), torch.float16)
    return weights, forward(model, request["token_ids"]), {"layer": type(next(iter(layers.values()))).__name__}


if __name__ == "__main__":
    serve(load, save)
