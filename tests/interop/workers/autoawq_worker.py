"""AutoAWQ loads, or quantizes and saves, an AWQ checkpoint, with its plain torch layer.

Shim: on a CPU its loader insists on layers of intel_extension_for_pytorch, which has ended and has no release for this
torch; told of another device, it takes its own layer, whose torch code runs anywhere.
`settings`: its quant_config.
"""

from __future__ import annotations

from typing import Any

import awq.models.base
import torch
from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]
from exchange import calibration_ids, forward, serve, used_weights


def load(request: dict[str, Any]) -> Any:
    awq.models.base.get_best_device = lambda: "none"
    model = AutoAWQForCausalLM.from_quantized(request["checkpoint"], fuse_layers=False, device_map={"": "cpu"}).model
    weights = used_weights(model, lambda layer: hasattr(layer, "qweight"), torch.float16)
    layers = {type(layer).__name__ for layer in model.modules() if hasattr(layer, "qweight")}
    return (
        {name: weight.squeeze(-1) for name, weight in weights.items()},
        forward(model, request["token_ids"]),
        {"layer": sorted(layers)},
    )


def save(request: dict[str, Any]) -> Any:
    model = AutoAWQForCausalLM.from_pretrained(request["source"], device_map={"": "cpu"}, torch_dtype=torch.float16)
    samples = [ids[0].tolist() for ids in calibration_ids(request)]
    model.quantize(None, request["settings"], calib_data=samples, max_calib_seq_len=64)
    model.save_quantized(request["checkpoint"])
    return load(request)


if __name__ == "__main__":
    serve(load, save)
