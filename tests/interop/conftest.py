"""Tiny quantized checkpoints in a directory, and the dense model that they must equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.formats.base import Format
from aphroquant.schemes import FloatScheme, IntegerScheme, QuantizedWeight, Scheme

TinyCheckpoint = Callable[..., Path]


class QuantizedCheckpoint(NamedTuple):
    path: Path
    dense_model: Any  # in float32, with the dequantized weights
    token_ids: torch.Tensor


@pytest.fixture(scope="session")
def round_to_nearest() -> Callable[[torch.Tensor, Scheme], QuantizedWeight]:
    return _round_to_nearest


@pytest.fixture(scope="session")
def quantized_checkpoint(
    tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., QuantizedCheckpoint]:
    """`quantized_checkpoint(format_class, scheme_of)`: every linear layer but lm_head in the scheme of its name.

    `rounded_to` is the dtype that the reader computes the weights in, if it is not float32.
    """

    def make(
        target: type[Format], scheme_of: Callable[[str], Scheme], rounded_to: torch.dtype = torch.float32
    ) -> QuantizedCheckpoint:
        source = tiny_checkpoint("llama", hidden_size=128, intermediate_size=256)
        return _quantize_checkpoint(source, tmp_path_factory.mktemp(target.name), target, scheme_of, rounded_to)

    return make


def _quantize_checkpoint(
    source: Path, folder: Path, target: type[Format], scheme_of: Callable[[str], Scheme], rounded_to: torch.dtype
) -> QuantizedCheckpoint:
    from transformers import AutoModelForCausalLM

    state = load_file(source / "model.safetensors")
    schemes = {
        name.removesuffix(".weight"): scheme_of(name.removesuffix(".weight"))
        for name in state
        if name.endswith("_proj.weight")
    }
    written = target.for_schemes(schemes, ["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = dict(state)
    for module, scheme in schemes.items():
        weight = _round_to_nearest(tensors.pop(f"{module}.weight"), scheme)
        tensors |= {f"{module}.{name}": tensor for name, tensor in written.write(module, weight).items()}
        model.get_submodule(module).weight.data = weight.dequantize(rounded_to).float()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": written.quantization_config()}))
    token_ids = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    return QuantizedCheckpoint(folder, model, token_ids)


def _round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(scheme, IntegerScheme):
        return QuantizedWeight(scheme, _round_to_integers(weight, scheme), shape)
    assert isinstance(scheme, FloatScheme)
    rows, columns = scheme.block_shape or (shape[0] if scheme.granularity == "tensor" else 1, shape[1])
    limits = torch.nn.functional.pad(weight.abs(), (0, -shape[1] % columns, 0, -shape[0] % rows))
    limits = limits.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))  # [blocks, blocks]
    scales = (limits / 448).bfloat16().float()
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"codes": codes, "scales": scales.reshape(()) if scheme.granularity == "tensor" else scales}
    if scheme.activations and not scheme.activations.dynamic:
        tensors["input_scale"] = torch.tensor(0.05)
    return QuantizedWeight(scheme, tensors, shape)


def _round_to_integers(weight: torch.Tensor, scheme: IntegerScheme) -> dict[str, torch.Tensor]:
    limit, group = 2**scheme.bits - 1, scheme.group_size or weight.shape[1]
    groups = weight.unflatten(1, (-1, group))  # [N, G, group]
    if scheme.symmetric:
        scales = groups.abs().amax(-1).mul(2 / limit).half()
        zeros = torch.full_like(scales, 2 ** (scheme.bits - 1))
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / limit).half()
        zeros = (-low / scales).round().clamp(0, limit)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, limit)
    tensors = {"codes": codes.flatten(1).to(torch.uint8), "scales": scales}
    return tensors if scheme.symmetric else tensors | {"zeros": zeros.to(torch.uint8)}
