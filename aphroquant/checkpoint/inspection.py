"""What a checkpoint is made of: model, sizes, schemes by role, everything that is not quantized, problems.

A role is a module or tensor name with its layer number taken out, `model.layers.*.mlp.up_proj`: what is the same in
all layers is told once, and a layer that differs stands out.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aphroquant.checkpoint.base import Checkpoint, is_kv_scale
from aphroquant.checkpoint.expected import module_shapes
from aphroquant.checkpoint.problems import find_problems
from aphroquant.errors import InputError
from aphroquant.schemes import IntegerScheme, KQuantScheme, Scheme

_LAYER = re.compile(r"\.(\d+)\.", re.ASCII)


@dataclass(frozen=True)
class ModuleRow:
    """Modules of one role with the same scheme and shape. `layers` is "0-29", or "" outside the blocks."""

    role: str
    layers: str
    count: int
    scheme: str
    shape: tuple[int, int] | None
    bytes_per_group: float | None
    num_bytes: int


@dataclass(frozen=True)
class TensorRow:
    """Tensors of one role that belong to no matrix: norms, biases, scales of the KV cache."""

    role: str
    layers: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class KVScales:
    """The KV-cache scales that a checkpoint brings; the extremes are of the finite ones."""

    count: int
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class Inspection:
    """The whole report. What cannot be known (the model of a lone file) is None."""

    source: str
    path: str
    format: str
    family: str | None
    model: dict[str, Any]
    num_files: int
    num_bytes: int
    num_parameters: int | None
    bits_per_weight: float | None
    linear_bits_per_weight: float | None
    modules: list[ModuleRow]
    others: list[TensorRow]
    kv_scales: KVScales | None
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """The report on an opened checkpoint. InputError if its format cannot be read at all."""
    schemes = checkpoint.schemes()
    size = _size(checkpoint)
    return Inspection(
        source=checkpoint.source,
        path=str(checkpoint.path),
        format=checkpoint.format_name,
        family=_text(checkpoint.config.get("model_type")),
        model=_model(checkpoint),
        num_files=len({info.file for info in checkpoint.tensors.values()}),
        num_bytes=checkpoint.num_bytes,
        **size,
        modules=_module_rows(checkpoint, schemes),
        others=_tensor_rows(checkpoint, schemes),
        kv_scales=_kv_scales(checkpoint),
        problems=find_problems(checkpoint),
    )


def role(name: str) -> str:
    """The name with its layer number as `*`."""
    return _LAYER.sub(".*.", name, count=1)


def layer_ranges(names: Iterable[str]) -> str:
    """The layer numbers of the names, "0-3, 5"; "" if they have none."""
    layers = sorted({int(match[1]) for name in names if (match := _LAYER.search(name))})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _size(checkpoint: Checkpoint) -> dict[str, Any]:
    from aphroquant.evaluation.size import num_parameters, stored_size

    try:
        size = stored_size(checkpoint)
    except InputError:  # the model is unknown, which find_problems tells
        return {"num_parameters": None, "bits_per_weight": None, "linear_bits_per_weight": None}
    return {
        "num_parameters": num_parameters(checkpoint.spec),
        "bits_per_weight": size.bits_per_weight,
        "linear_bits_per_weight": size.linear_bits_per_weight,
    }


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sizes of the decoder; empty for a model that is not known."""
    try:
        spec = checkpoint.spec
    except InputError:
        return {}
    return {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_theta": spec.rope.theta,
        "rope_scaling": spec.rope.kind,
        "dtype": _text(checkpoint.config.get("dtype")) or _text(checkpoint.config.get("torch_dtype")),
    }


def _text(value: Any) -> str | None:
    """A name out of a config, which may hold anything; None for what is none."""
    return value if isinstance(value, str) and value.isprintable() else None


def _module_rows(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[ModuleRow]:
    stored = checkpoint.module_bytes()
    shapes = module_shapes(checkpoint)
    groups: dict[tuple[str, Scheme, tuple[int, int] | None], list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        groups[role(module), scheme, shapes.get(module)].append(module)
    return [
        ModuleRow(
            role=name,
            layers=layer_ranges(modules),
            count=len(modules),
            scheme=str(scheme),
            shape=shape,
            bytes_per_group=_bytes_per_group(scheme, shape, stored[modules[0]]),
            num_bytes=sum(stored[module] for module in modules),
        )
        for (name, scheme, shape), modules in groups.items()
    ]


def _bytes_per_group(scheme: Scheme, shape: tuple[int, int] | None, num_bytes: int) -> float | None:
    """Stored bytes for one group of weights that share a scale, with its part of everything stored."""
    if shape is None:
        return None
    if isinstance(scheme, IntegerScheme):
        return num_bytes / (shape[0] * scheme.num_groups(shape[1]))
    return num_bytes / (math.prod(shape) / 256) if isinstance(scheme, KQuantScheme) else None


def _tensor_rows(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[TensorRow]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for name in checkpoint.dense_names():
        if name.removesuffix(".weight") not in schemes or not name.endswith(".weight"):
            info = checkpoint.tensors[name]
            groups[role(name), str(info.dtype).removeprefix("torch."), info.shape].append(name)
    return [
        TensorRow(
            role=name,
            layers=layer_ranges(names),
            count=len(names),
            dtype=dtype,
            shape=shape,
            num_bytes=sum(checkpoint.tensors[tensor].nbytes for tensor in names),
        )
        for (name, dtype, shape), names in groups.items()
    ]


def _kv_scales(checkpoint: Checkpoint) -> KVScales | None:
    names = [name for name in checkpoint.tensors if is_kv_scale(name)]
    if not names:
        return None
    values = [value for name in names for value in checkpoint.read(name).float().flatten().tolist()]
    finite = [value for value in values if math.isfinite(value)]
    return KVScales(len(names), min(finite, default=None), max(finite, default=None))
