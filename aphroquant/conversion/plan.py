"""The plan of a conversion: everything that can be found out, and found wrong, before any work."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.solvers import Solver
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion.assignment import assign
from aphroquant.conversion.kv_cache import check_kv_scales, in_targets_shape, new_scales, written_names
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import ModuleRule, RuleBook, matches
from aphroquant.conversion.sizes import module_headers, num_bytes
from aphroquant.conversion.soundness import finite_pieces
from aphroquant.conversion.targets import (
    HEAD_TARGETS,
    TargetScheme,
    check_target,
    needs_calibration,
    training_steps,
)
from aphroquant.errors import ResourceError, UsageError
from aphroquant.formats import format_class
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.models.spec import EMBEDDING, LM_HEAD, DecoderSpec
from aphroquant.schemes import DenseScheme, Scheme

DEQUANTIZED_DTYPE = torch.float16  # of quantized embeddings and heads, which the targets keep dense
EXACT_DTYPE = torch.float32  # of the same where no bit may change: it holds whatever they dequantize to
_MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ONE_DTYPE = ("bitsandbytes",)  # whose layers pass dense numbers on as they are stored: dtypes must not meet
_SPOOL_SHARE = 1.05  # free disk beyond the output: headers and rounding up


@dataclass(frozen=True)
class ConversionPlan:
    """What will be done. `modules` maps those to be quantized to (out_features, in_features), in order of execution;
    `schemes` and `solvers` say how.

    Steps of training are of each block (refinement) and of the whole model (distillation); 0: none.
    """

    request: ConversionRequest
    checkpoint: Checkpoint
    schemes: Mapping[str, TargetScheme]
    solvers: Mapping[str, Solver]
    format: Format
    modules: dict[str, tuple[int, int]]
    scale_dtype: torch.dtype
    calibrates: bool
    refine_steps: int = 0
    distill_steps: int = 0

    @cached_property
    def module_headers(self) -> dict[str, dict[str, TensorHeader]]:
        """What each module will be stored as, by suffix."""
        return module_headers(self.format, self.modules, self.schemes, self.scale_dtype)

    @cached_property
    def module_bytes(self) -> dict[str, int]:
        return {module: num_bytes(headers) for module, headers in self.module_headers.items()}

    @cached_property
    def dense_headers(self) -> dict[str, TensorHeader]:
        """What each tensor that stays dense will be, by the names that it gets."""
        target = self.request.to
        carried = carried_headers(self.checkpoint, self.dense_names, target, DEQUANTIZED_DTYPE)
        shapes = {name: in_targets_shape(name, (1,), target) for name in self.cache_scales.values()}
        return carried | {name: TensorHeader(torch.float32, shape) for name, shape in shapes.items()}

    @cached_property
    def cache_scales(self) -> dict[str, str]:
        """Names of the KV cache's scales that are to be found, and those that the target has for them."""
        return new_scales(self.spec, self.request.to) if self.request.kv_scales else {}

    @cached_property
    def dense_names(self) -> list[str]:
        """Tensors that are carried over: all that is not the weight of a module to be quantized."""
        return carried_tensors(self.checkpoint, set(self.modules))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(self.module_bytes.values()) + num_bytes(self.dense_headers)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized modules, scales and zero points included."""
        weights = sum(rows * columns for rows, columns in self.modules.values())
        return 8 * sum(self.module_bytes.values()) / weights

    @property
    def spec(self) -> DecoderSpec:
        return self.checkpoint.spec

    @property
    def needs_output_moments(self) -> list[str]:
        """The modules whose solver wants to know of gradients by their outputs."""
        return [name for name, solver in self.solvers.items() if solver.needs_output_moments]

    def calibrates_module(self, module: str) -> bool:
        """Whether its solver looks at the inputs of the module."""
        return needs_calibration(self.schemes[module], self.solvers[module], self.request.samples)


def make_plan(checkpoint: Checkpoint, request: ConversionRequest, *, checks_disk: bool = True) -> ConversionPlan:
    """Check a request against a model. UsageError, InputError or ResourceError for what cannot be done."""
    format_type = format_class(request.to)
    check_target(request.to)
    spec = checkpoint.spec
    book = RuleBook(request.rules, spec, checkpoint.schemes())
    chosen, kept = _split_modules(checkpoint, request, book)
    shapes = {module: _linear_shape(spec, module) for module in chosen}
    schemes, solvers = assign(request, book, {module: shape[1] for module, shape in shapes.items()})
    seen = [module for module in chosen if needs_calibration(schemes[module], solvers[module], request.samples)]
    check_kv_scales(checkpoint, request)
    calibrates = bool(seen) or request.kv_scales
    if seen and request.samples == 0:
        raise UsageError(
            f"static input scales ({schemes[seen[0]]}) need calibration, but samples = 0",
            hint="give --samples a number, or take a scheme whose inputs are left alone or scaled as they come",
        )
    if calibrates and request.seq_len > spec.max_position_embeddings:
        raise UsageError(
            f"seq_len = {request.seq_len} is longer than the model's context of {spec.max_position_embeddings} tokens"
        )
    dense = dict.fromkeys([*kept, *_other_matrices(checkpoint), LM_HEAD])
    target = format_type.for_schemes(schemes, [module for module in dense if module not in schemes])
    target = target.for_model(model_dtype(checkpoint), checkpoint.format)
    dtype = _scale_dtype(checkpoint, request.to)
    used = dict.fromkeys(schemes.values())
    steps = training_steps(request, used, calibrates=calibrates, has_experts=spec.experts is not None)
    plan = ConversionPlan(request, checkpoint, schemes, solvers, target, shapes, dtype, calibrates, *steps)
    if spec.experts is not None and plan.needs_output_moments:
        name = plan.solvers[plan.needs_output_moments[0]].name
        raise UsageError(f"solver {name} knows nothing of experts, which this model has", hint="awq-gptq does")
    if checks_disk:
        check_disk(request.out, plan.num_bytes)
    return plan


def carried_tensors(checkpoint: Checkpoint, quantized: set[str]) -> list[str]:
    """Names of the stored tensors to carry over if these modules' weights are written anew."""
    names = checkpoint.dense_names()
    kept = [name for name in names if not (name.endswith(".weight") and name.removesuffix(".weight") in quantized)]
    # Quantized in the source, dense in the target (a GGUF file's embedding): written under their plain names.
    others = [
        f"{module}.weight"
        for module, scheme in checkpoint.schemes().items()
        if not isinstance(scheme, DenseScheme) and module not in quantized
    ]
    return [*kept, *(name for name in others if name not in set(kept))]


class Carried(NamedTuple):
    """A carried tensor as it will be stored, in consecutive pieces of its elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterator[Tensor]


def read_carried(checkpoint: Checkpoint, name: str, target: str, dtype: torch.dtype) -> Carried:
    """A carried tensor byte for byte, or as `dtype` if only the source quantizes it. InputError from the pieces if
    they hold NaN or infinity."""
    module, dtype = name.removesuffix(".weight"), _carried_dtype(checkpoint, name, target, dtype)
    if is_dequantized(checkpoint, name):
        shape = _matrix_shape(checkpoint, module)
        dense = (piece.dequantize(dtype).flatten() for piece in checkpoint.weight_pieces(module))
        return Carried(dtype, shape, finite_pieces(checkpoint, name, dense))
    stored = (piece.to(dtype) for piece in checkpoint.read_pieces(name))
    return Carried(dtype, checkpoint.info(name).shape, finite_pieces(checkpoint, name, stored))


def carried_headers(
    checkpoint: Checkpoint, names: Sequence[str], target: str, dtype: torch.dtype
) -> dict[str, TensorHeader]:
    """What carried tensors will be in the output, under all the names that they have there, in the order of writing."""
    headers = {}
    written = written_names(checkpoint, names, target)
    for name in names:
        kept = _carried_dtype(checkpoint, name, target, dtype)
        dequantized = is_dequantized(checkpoint, name)
        shape = _matrix_shape(checkpoint, name.removesuffix(".weight")) if dequantized else checkpoint.info(name).shape
        for new_name in written[name]:
            headers[new_name] = TensorHeader(kept, in_targets_shape(new_name, shape, target))
    return headers


def _carried_dtype(checkpoint: Checkpoint, name: str, target: str, dequantized: torch.dtype) -> torch.dtype:
    """Its own; `dequantized` of what only the source quantizes. GGUF files have float32 norms among smaller matrices,
    so that where only one dtype may be it is float32, which holds all of them."""
    if checkpoint.format_name == "gguf" and target in _ONE_DTYPE:
        return EXACT_DTYPE
    return dequantized if is_dequantized(checkpoint, name) else checkpoint.info(name).dtype


def check_disk(out: Path, num_bytes: int) -> None:
    """ResourceError unless the disk of `out` has room for that many bytes."""
    place = out.expanduser().resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes * _SPOOL_SHARE:
        raise ResourceError(
            f"{out}: the output needs {size_text(num_bytes * _SPOOL_SHARE)}, but the disk has {size_text(free)} free",
            hint="free some space or give another --out",
        )


def _split_modules(checkpoint: Checkpoint, request: ConversionRequest, book: RuleBook) -> tuple[list[str], list[str]]:
    """(to be quantized, to be left dense) among the block linears and what rules name beside them."""
    schemes: dict[str, Scheme] = dict(checkpoint.schemes())
    linears = checkpoint.spec.modules()
    known = matched_modules(request.ignore, [*linears, *schemes, LM_HEAD, EMBEDDING])
    kept_by_rule = {module for module, rule in book.decided.items() if rule.keep}
    modules = [module for module in linears if module in schemes]
    layers = set(linears)
    for module, rule in book.decided.items():
        if module not in layers and module not in known and not rule.keep:
            _require_head(checkpoint, request, module, rule)
            modules.append(module)
    kept = [module for module in modules if module in known or module in kept_by_rule]
    chosen = [module for module in modules if module not in set(kept)]
    if not chosen:
        hint = "give fewer --ignore patterns" + (" and rules that keep modules" if kept_by_rule else "")
        raise UsageError("nothing is left to quantize", hint=hint)
    return chosen, kept


def _require_head(checkpoint: Checkpoint, request: ConversionRequest, module: str, rule: ModuleRule) -> None:
    """UsageError unless a module beside the block linears is a head that the target can hold quantized."""
    if module != LM_HEAD:
        hint = "gguf quantizes embeddings" if module == EMBEDDING else None
        raise UsageError(f"rule {str(rule)!r}: {module} stays dense in {request.to}", hint=hint)
    if LM_HEAD not in checkpoint.schemes():
        raise UsageError(
            f"rule {str(rule)!r}: lm_head has no weight of its own, being tied to the embedding, which stays dense",
            hint="gguf quantizes embeddings",
        )
    if request.to not in HEAD_TARGETS:
        raise UsageError(
            f"rule {str(rule)!r}: readers of {request.to} take lm_head for dense",
            hint=f"{', '.join(HEAD_TARGETS)} and gguf can quantize it",
        )


def _linear_shape(spec: DecoderSpec, module: str) -> tuple[int, int]:
    return (spec.vocab_size, spec.hidden_size) if module == LM_HEAD else spec.linear_shape(module.split(".", 3)[3])


def matched_modules(patterns: Sequence[str], modules: Sequence[str]) -> set[str]:
    """Those that `--ignore` names. UsageError for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        matching = {module for module in modules if matches(module, pattern)}
        if not matching:
            raise UsageError(f"--ignore {pattern} matches no module; a name is {modules[0] if modules else 'unknown'}")
        found |= matching
    return found


def is_dequantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a carried tensor is quantized in the source."""
    scheme = checkpoint.schemes().get(name.removesuffix(".weight"))
    return name.endswith(".weight") and scheme is not None and not isinstance(scheme, DenseScheme)


def _matrix_shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    if checkpoint.format is None:  # GGUF, whose headers tell
        return checkpoint.info(f"{module}.weight").shape
    return checkpoint.weight(module).shape


def _other_matrices(checkpoint: Checkpoint) -> list[str]:
    """Modules with a matrix that are no block linears: they stay as they are (the embedding is no linear layer)."""
    known = {*checkpoint.spec.modules(), EMBEDDING}
    return [module for module in checkpoint.schemes() if module not in known]


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the model computes in: what its config says, else what most of its dense numbers are."""
    found = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    named = next((dtype for dtype in _MODEL_DTYPES if str(dtype) == f"torch.{found}"), None)
    if named is not None:
        return named
    stored: Counter[torch.dtype] = Counter()
    for name in checkpoint.dense_names():
        stored[checkpoint.info(name).dtype] += checkpoint.info(name).nbytes
    return max(_MODEL_DTYPES, key=lambda dtype: stored[dtype])


def _scale_dtype(checkpoint: Checkpoint, target: str) -> torch.dtype:
    """float16; bfloat16 in compressed-tensors of a bfloat16 model, whose readers compute in the model's dtype."""
    schemes = checkpoint.schemes().values()
    dtypes = {scheme.dtype for scheme in schemes if isinstance(scheme, DenseScheme)}
    return torch.bfloat16 if target == "compressed-tensors" and dtypes == {torch.bfloat16} else torch.float16
