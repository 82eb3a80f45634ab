"""Quantized checkpoints for outside libraries to load, and the dense model that they must equal.

Round-to-nearest, written here from the definition of the schemes: the solvers are not what is under test.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from aphroquant.formats.base import Format
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme


class QuantizedCheckpoint(NamedTuple):
    path: Path
    dense_model: Any  # in float32, with the dequantized weights
    token_ids: torch.Tensor


def quantize_checkpoint(
    source: Path,
    folder: Path,
    target: type[Format],
    scheme_of: Callable[[str], Scheme],
    rounded_to: torch.dtype = torch.float32,
) -> QuantizedCheckpoint:
    """Every linear layer but lm_head, in the scheme of its name. The dense model has the weights of `rounded_to`."""
    from transformers import AutoModelForCausalLM

    tensors = load_file(source / "model.safetensors")
    linears = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
    schemes = {module: scheme_of(module) for module in linears}
    written = target.for_schemes(schemes, ["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for module, scheme in schemes.items():
        if isinstance(scheme, DenseScheme):
            continue
        weight = round_to_nearest(tensors.pop(f"{module}.weight"), scheme)
        tensors |= {f"{module}.{name}": tensor for name, tensor in written.write(module, weight).items()}
        model.get_submodule(module).weight.data = weight.dequantize(rounded_to).float()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_config(folder, written.quantization_config())
    return QuantizedCheckpoint(folder, model, sample_tokens(model.config.vocab_size))


def sample_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(scheme, IntegerScheme):
        return QuantizedWeight(scheme, _round_to_integers(weight, scheme), shape)
    assert isinstance(scheme, FloatScheme)
    rows, columns = scheme.block_shape or (shape[0] if scheme.granularity == "tensor" else 1, shape[1])
    limits = torch.nn.functional.pad(weight.abs(), (0, -shape[1] % columns, 0, -shape[0] % rows))
    limits = limits.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))  # [row blocks, column blocks]
    scales = (limits / 448).bfloat16().float()
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"codes": codes, "scales": scales.reshape(()) if scheme.granularity == "tensor" else scales}
    if scheme.activations and not scheme.activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.05)
    return QuantizedWeight(scheme, tensors, shape)


def _round_to_integers(weight: torch.Tensor, scheme: IntegerScheme) -> dict[str, torch.Tensor]:
    limit, group = 2**scheme.bits - 1, scheme.group_size or weight.shape[1]
    order = torch.arange(weight.shape[1])
    if scheme.act_order:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    groups = weight[:, order].unflatten(1, (-1, group))  # [N, G, group]
    if scheme.symmetric:
        scales = groups.abs().amax(-1).mul(2 / limit).half()
        zeros = torch.full_like(scales, 2 ** (scheme.bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / limit).half()
        zeros = (-low / scales).round().clamp(0, limit)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, limit).flatten(1)
    position = order.argsort()  # of each input column within the order
    tensors = {"codes": codes[:, position].to(torch.uint8), "scales": scales}
    if not scheme.symmetric:
        tensors["zeros"] = zeros.to(torch.uint8)
    if scheme.act_order:
        tensors["group_index"] = (position // group).to(torch.int32)
    return tensors


def _write_config(folder: Path, quantization_config: Mapping[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}, indent=2))
