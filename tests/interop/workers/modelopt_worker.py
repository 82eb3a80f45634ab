"""ModelOpt quantizes a model and exports it as a checkpoint, and decodes the tensors of one.

It has no loader for such checkpoints (engines have), so the weights are what its tensor classes make of the files.
`settings`: `config`, the name of one of its presets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq  # type: ignore[import-not-found]
import torch
from exchange import calibration_ids, forward, serve
from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-not-found]
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor  # type: ignore[import-not-found]
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def load(request: dict[str, Any]) -> Any:
    tensors = load_file(Path(request["checkpoint"]) / "model.safetensors")
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    return {module: decoded(module, tensors) for module in modules}, None, {}


def decoded(module: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    data, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if data.dtype == torch.float8_e4m3fn:
        weight: torch.Tensor = FP8QTensor(data.shape, torch.float32, data).dequantize(
            scale=scale[:, None] if scale.ndim == 1 else scale
        )
        return weight
    shape = torch.Size([data.shape[0], 2 * data.shape[1]])
    second = tensors[f"{module}.weight_scale_2"]
    unpacked: torch.Tensor = NVFP4QTensor(shape, torch.float32, data).dequantize(
        scale=scale, double_scale=second, block_sizes={-1: 16}
    )
    return unpacked


def save(request: dict[str, Any]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype=torch.float32)

    def calibrate(model: Any) -> None:
        for ids in calibration_ids(request):
            forward(model, ids)

    model = mtq.quantize(model, getattr(mtq, request["settings"]["config"]), calibrate)
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=request["checkpoint"])
    return load(request)


if __name__ == "__main__":
    serve(load, save)
