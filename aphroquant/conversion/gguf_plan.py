"""The plan of a GGUF file: the type of every tensor, whose numbers stay, and what a GGUF file has no place for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from aphroquant.checkpoint import Checkpoint, GgufTensorPlan
from aphroquant.checkpoint.base import is_kv_scale
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.conversion.assignment import naming_rule, with_rule
from aphroquant.conversion.gguf_types import BY_BITS, is_dense, label, resolve_types, type_of, wished_type
from aphroquant.conversion.loss import LossError, contradiction
from aphroquant.conversion.plan import check_disk, matched_modules
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import ModuleRule, RuleBook
from aphroquant.conversion.scales import check_scales
from aphroquant.errors import UsageError
from aphroquant.formats.gguf import BlockType, block_type, exact_type
from aphroquant.models.spec import LM_HEAD, DecoderSpec
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

_DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_UNROUNDED = "f32"  # holds whatever a source dequantizes to
_COMPUTED = (".rotary_emb.inv_freq",)  # buffers that older checkpoints store and nothing reads
# What a name of a GGUF file usually ends with; a new file gets its own type's name there.
_TYPE_SUFFIX = re.compile(r"[-._](I?Q\d\w*|MXFP4|NVFP4|B?F16|F32)$", re.IGNORECASE | re.ASCII)


class LeftOut(NamedTuple):
    """Tensors that GGUF has no place for: `kv_scales`, a head that repeats the embedding, and what else there is."""

    kv_scales: list[str]
    tied_head: list[str]
    others: list[str]


@dataclass(frozen=True)
class GgufPlan:
    """What will be written. `tensors` are by Hugging Face name, in the order of the file; `exact` are the modules
    whose quantized numbers stay, `kept` those that stay dense because of `--ignore`; `types_name` is the mix or type
    asked for, None if all numbers stay; `by_rule` has those that rules ask for, by module."""

    request: ConversionRequest
    checkpoint: Checkpoint
    tensors: Mapping[str, GgufTensorPlan]
    exact: frozenset[str]
    kept: frozenset[str]
    left_out: LeftOut
    types_name: str | None
    by_rule: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def types(self) -> dict[str, str]:
        """The type of each matrix, by module."""
        return {
            name.removesuffix(".weight"): tensor.type for name, tensor in self.tensors.items() if len(tensor.shape) > 1
        }

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the matrices that are quantized in the file."""
        return {
            module: (self.tensors[f"{module}.weight"].shape[0], self.tensors[f"{module}.weight"].shape[1])
            for module, kind in self.types.items()
            if not is_dense(kind)
        }

    @property
    def carried(self) -> list[str]:
        """Names of the tensors whose numbers are those of a dense source tensor."""
        return [name for name in self.tensors if name.removesuffix(".weight") not in self.exact]

    @cached_property
    def num_bytes(self) -> int:
        return sum(_num_bytes(tensor) for tensor in self.tensors.values())

    @cached_property
    def module_bytes(self) -> dict[str, int]:
        """Of each matrix, quantized or not."""
        return {module: _num_bytes(self.tensors[f"{module}.weight"]) for module in self.types}

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized matrices; of all, if none is quantized."""
        chosen = [f"{module}.weight" for module in self.modules or self.types]
        weights = sum(self.tensors[name].shape[0] * self.tensors[name].shape[1] for name in chosen)
        return 8 * sum(_num_bytes(self.tensors[name]) for name in chosen) / weights

    @property
    def stand_ins(self) -> list[str]:
        """Block linears whose rows are no whole blocks of the type that they should have had."""
        asked, spec = self.types_name, self.checkpoint.spec
        if asked is None:
            return []
        chosen = {module: kind for module, kind in self.layer_types.items() if module not in self.kept}
        by_rule = self.by_rule
        return [
            module
            for module, kind in chosen.items()
            if kind != wished_type(by_rule.get(module, asked), module, spec, by_rule=module in by_rule)
        ]

    @property
    def path(self) -> Path:
        """The file to write: `out` itself, or in the directory `out` a file named after the model and its types."""
        out = self.request.out
        if out.suffix.lower() == ".gguf":
            return out
        source = self.checkpoint.path.resolve()
        name = _TYPE_SUFFIX.sub("", source.name if source.is_dir() else source.stem)
        return out / f"{name}-{label(self.layer_types, self.types_name)}.gguf"

    @property
    def layer_types(self) -> dict[str, str]:
        """The type of each block linear."""
        return {module: self.types[module] for module in self.checkpoint.spec.modules() if module in self.types}


def make_gguf_plan(
    checkpoint: Checkpoint, request: ConversionRequest, reason: str | None, *, checks_disk: bool = True
) -> GgufPlan:
    """The plan. LossError if the source is quantized in numbers that GGUF, or the request, does not keep, unless
    `reason` says that they need not stay."""
    shapes, left_out = _placed(checkpoint)
    kept = frozenset(matched_modules(request.ignore, [name.removesuffix(".weight") for name in shapes]))
    by_rule: dict[str, str] = {}
    if keeps_numbers(checkpoint, reason):
        types_name, types = None, _exact_types(checkpoint, request, shapes)
        exact = frozenset(_quantized(checkpoint))
        integers = [module for module in exact if isinstance(checkpoint.schemes()[module], IntegerScheme)]
        check_scales(checkpoint, integers, request.to)
    else:
        types_name, exact = resolve_types(request), frozenset[str]()
        book = RuleBook(request.rules, checkpoint.spec, checkpoint.schemes())
        kept |= {module for module, rule in book.decided.items() if rule.keep}
        by_rule = _types_by_rule(request, book, kept, shapes)
        types = _chosen_types(checkpoint, kept, types_name, by_rule, shapes)
    plan = GgufPlan(
        request,
        checkpoint,
        {name: GgufTensorPlan(shape, types.get(name, "F32")) for name, shape in shapes.items()},
        exact,
        kept,
        left_out,
        types_name,
        by_rule,
    )
    if checks_disk:
        check_disk(plan.path, plan.num_bytes)
    return plan


def keeps_numbers(checkpoint: Checkpoint, reason: str | None) -> bool:
    """Whether a source's own numbers are to stay: it is quantized, and no `reason` against it is known."""
    return reason is None and bool(_quantized(checkpoint))


def weight_only(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight without what its layer does to inputs, which a GGUF file says nothing about."""
    tensors = {name: tensor for name, tensor in weight.tensors.items() if name != "input_scale"}
    return replace(weight, scheme=weight_only_scheme(weight.scheme), tensors=tensors)


def weight_only_scheme(scheme: Scheme) -> Scheme:
    if isinstance(scheme, IntegerScheme | FloatScheme | LookupScheme) and scheme.activations is not None:
        return replace(scheme, activations=None)
    return scheme


def _placed(checkpoint: Checkpoint) -> tuple[dict[str, tuple[int, ...]], LeftOut]:
    """Shapes of the tensors that a GGUF file of this model has, in its order, and the source's others."""
    spec = checkpoint.spec
    modules, vectors = expected_modules(spec), expected_vectors(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in {f"{module}.weight": shape for module, shape in modules.items()}.items():
        shapes[name] = shape
    shapes |= {name: (length,) for name, length in vectors.items()}
    left = LeftOut([], [], [])
    for name in checkpoint.dense_names():
        if name in shapes or name.endswith(_COMPUTED):
            continue
        is_tied = name == f"{LM_HEAD}.weight" and spec.tie_word_embeddings
        (left.tied_head if is_tied else left.kv_scales if is_kv_scale(name) else left.others).append(name)
    left.others.extend(f"{module}.weight" for module in _quantized(checkpoint) if module not in modules)
    return shapes, left


def _quantized(checkpoint: Checkpoint) -> list[str]:
    return [module for module, scheme in checkpoint.schemes().items() if not isinstance(scheme, DenseScheme)]


def _exact_types(
    checkpoint: Checkpoint, request: ConversionRequest, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The type that keeps every number. LossError saying why there is none."""
    types, layers = {}, set(checkpoint.spec.modules())
    for module, scheme in checkpoint.schemes().items():
        name = f"{module}.weight"
        if name not in shapes:
            continue
        if isinstance(scheme, DenseScheme):
            types[name] = _dense_type(name, scheme)
            continue
        try:
            kind = exact_type(module, weight_only_scheme(scheme), shapes[name][1])
        except UsageError as error:
            raise LossError(error.message) from error
        if module in layers:
            _check_asked(request, module, scheme, kind, shapes[name][1], checkpoint.spec)
        types[name] = kind.name if (request.scheme or "").lower() != _UNROUNDED else "F32"
    return types


def _check_asked(
    request: ConversionRequest, module: str, scheme: Scheme, kind: BlockType, columns: int, spec: DecoderSpec
) -> None:
    """LossError if the request asks for other numbers than those of a layer, which is `kind` in a GGUF file."""
    if request.scheme is not None or request.whole_bits in BY_BITS:
        name = resolve_types(replace(request, group_size=None, symmetric=None, solver=None))
        if name == _UNROUNDED or type_of(name, module, columns, spec) == kind.name:
            request = replace(request, scheme=None, bits=None)
    reason = contradiction(request, scheme)
    if reason is not None:
        raise LossError(reason)


def _chosen_types(
    checkpoint: Checkpoint,
    kept: frozenset[str],
    types_name: str,
    by_rule: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    spec, schemes = checkpoint.spec, checkpoint.schemes()
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    types = {}
    for module in modules:
        name, scheme = f"{module}.weight", schemes[module]
        if module not in kept:
            asked = by_rule.get(module, types_name)
            types[name] = type_of(asked, module, shapes[name][1], spec, by_rule=module in by_rule)
        elif isinstance(scheme, DenseScheme):
            types[name] = _dense_type(name, scheme)
        else:
            types[name] = "F16"
    return types


def _types_by_rule(
    request: ConversionRequest, book: RuleBook, kept: frozenset[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The mix or type that rules ask for, by module."""
    names: dict[ModuleRule, str] = {}
    found = {}
    for module, rule in book.decided.items():
        if module in kept:
            continue
        if f"{module}.weight" not in shapes:
            hint = "it is tied to the embedding: write embedding" if module == LM_HEAD else None
            raise UsageError(f"rule {str(rule)!r}: {module} has no tensor in a GGUF file", hint=hint)
        if rule not in names:
            with naming_rule(rule):
                names[rule] = resolve_types(with_rule(request, rule))
        found[module] = names[rule]
    return found


def _dense_type(name: str, scheme: DenseScheme) -> str:
    if scheme.dtype not in _DENSE_TYPES:
        raise UsageError(f"{name} is {scheme}, which no GGUF type holds")
    return _DENSE_TYPES[scheme.dtype]


def _num_bytes(tensor: GgufTensorPlan) -> int:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    return rows * block_type(tensor.type).row_bytes(tensor.shape[-1])
