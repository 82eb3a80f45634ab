"""What can be asked of each target format: schemes by name, bit widths, group sizes, and the solvers that fit."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from aphroquant.calibration.effort import FEW_BITS, find_effort
from aphroquant.calibration.solvers import SOLVERS, Solver, find_solver
from aphroquant.conversion.request import PER_ROW, ConversionRequest
from aphroquant.errors import UsageError
from aphroquant.formats import FORMATS
from aphroquant.formats.bitsandbytes.four_bit import BLOCK_SIZES
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
)

TargetScheme = IntegerScheme | FloatScheme | LookupScheme | AdditiveScheme | AffineScheme

DEFAULT_BITS = 4
# Marlin, the kernel that engines use for 4 and 8 bits, knows 32, 64 and 128 (and whole rows); the largest that fits.
AUTOMATIC_GROUP_SIZES = (128, 64, 32)
ADDITIVE_SOLVER = "aqlm"
NEARLY_EXACT_BITS = 8  # where rounding to nearest leaves nothing to gain
FOUR_BIT_SCHEMES = {"bitsandbytes": "nf4", "modelopt": "nvfp4"}  # what --bits 4 means where w4a16 is no scheme
DEFAULT_SCHEMES = {"fp8": "fp8-dynamic", "modelopt": "fp8-static", "bitsandbytes": "int8", "aqlm": "aqlm-2x8"}
# transformers 5.23 with compressed-tensors 0.20 runs packed weights with zero points only dequantized.
SYMMETRIC_BY_DEFAULT = ("compressed-tensors",)

_TOKEN_INPUTS = {"int": ActivationScheme("int"), "float": ActivationScheme("float")}
_STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")
_BLOCK_INPUTS = ActivationScheme("float", granularity="group", group_size=128)
_FP8_STATIC = FloatScheme("tensor", activations=_STATIC_INPUTS)
_FP8_BLOCK = FloatScheme("block", (128, 128), _BLOCK_INPUTS)
_FP8_ROWS = FloatScheme("channel", activations=_TOKEN_INPUTS["float"])
_INT8_STATIC = ActivationScheme("int", dynamic=False, granularity="tensor")
_NVFP4 = LookupScheme("e2m1", 16, "e4m3")
_NVFP4_INPUTS = replace(_NVFP4, activations=ActivationScheme("float", 4, granularity="group", group_size=16))
_MXFP4 = LookupScheme("e2m1", 32, "e8m0")
_MXFP4_INPUTS = replace(_MXFP4, activations=ActivationScheme("float", 4, granularity="group", group_size=32))
_FLAT_BLOCK = 64  # of bitsandbytes, unless --group-size gives another of its sizes

ONLY_READ = ("exl3",)

# Scheme names that fix everything, by target. Weight-only integers ("w4a16") leave group size and symmetry open.
FIXED_SCHEMES: Mapping[str, Mapping[str, TargetScheme]] = {
    "awq": {},
    "gptq": {},
    "fp8": {
        "fp8-dynamic": FloatScheme("tensor", activations=_TOKEN_INPUTS["float"]),
        "fp8-static": _FP8_STATIC,
        "fp8-block": _FP8_BLOCK,
    },
    "compressed-tensors": {
        "w8a8-int8": IntegerScheme(8, None, True, activations=_TOKEN_INPUTS["int"]),
        "w8a8-int8-static": IntegerScheme(8, None, True, activations=_INT8_STATIC),
        "fp8-dynamic": _FP8_ROWS,
        "fp8-static": _FP8_STATIC,
        "fp8-block": _FP8_BLOCK,
        "nvfp4": _NVFP4_INPUTS,
        "nvfp4a16": _NVFP4,
        "mxfp4": _MXFP4_INPUTS,
        "mxfp4a16": _MXFP4,
    },
    "auto-round": {},
    "hqq": {},
    "modelopt": {
        "fp8-static": _FP8_STATIC,
        "fp8-dynamic": _FP8_ROWS,
        "nvfp4": _NVFP4_INPUTS,
        "nvfp4a16": _NVFP4,
    },
    "bitsandbytes": {
        "int8": IntegerScheme(8, None, True),
        "nf4": LookupScheme("nf4", _FLAT_BLOCK, "float", flattened=True),
        "nf4-dq": LookupScheme("nf4", _FLAT_BLOCK, "nested", flattened=True),
        "fp4": LookupScheme("fp4", _FLAT_BLOCK, "float", flattened=True),
        "fp4-dq": LookupScheme("fp4", _FLAT_BLOCK, "nested", flattened=True),
    },
    "aqlm": {"aqlm-2x8": AdditiveScheme(2, 8), "aqlm-1x16": AdditiveScheme(1, 16)},
}
WEIGHT_ONLY_BITS: Mapping[str, tuple[int, ...]] = {
    "awq": (4,),
    "gptq": (2, 3, 4, 8),
    "fp8": (),
    "compressed-tensors": (2, 3, 4, 5, 6, 7, 8),
    "auto-round": (2, 3, 4, 8),
    "hqq": (2, 3, 4, 8),
    "modelopt": (),
    "bitsandbytes": (),
    "aqlm": (),
}
# Of these, what vLLM's kernels take; transformers dequantizes the others.
ENGINE_BITS: Mapping[str, tuple[int, ...]] = {"compressed-tensors": (4, 8)}
HEAD_TARGETS = ("gptq", "auto-round", "compressed-tensors", "hqq")  # whose readers know a quantized lm_head
_CODEBOOKS = re.compile(r"(?:aqlm-)?(\d+)x(\d+)(?:g(\d+))?")
_MAX_CODEBOOK_BITS = 16  # of a code, for books that are sought; files may have more


def check_known(target: str) -> None:
    """UsageError unless there is a target of that name."""
    if target in ONLY_READ:
        raise UsageError(f"{target} can be read, but not written", hint="give another format to --to")
    known = [name for name in [*FORMATS, "gguf"] if name not in ONLY_READ]
    if target not in known:
        near = difflib.get_close_matches(target.lower(), known, n=1)
        listed = f"the formats are {', '.join(known)}"
        raise UsageError(f"unknown format {target!r}", hint=f"Did you mean {near[0]!r}? {listed}" if near else listed)


def quantizable_targets() -> list[str]:
    """The formats that weights can be quantized for."""
    return [*FIXED_SCHEMES, "gguf"]


def can_be_quantized_for(target: str) -> bool:
    return target in quantizable_targets()


def check_target(target: str) -> None:
    """UsageError unless there is a solver for some scheme of this format."""
    if not can_be_quantized_for(target):
        raise UsageError(
            f"{target} only takes over numbers that the source already has, which this one has not",
            hint=f"weights can be quantized for {', '.join(quantizable_targets())}",
        )


def scheme_names(target: str) -> list[str]:
    """What --scheme takes for a target."""
    return [f"w{bits}a16" for bits in WEIGHT_ONLY_BITS[target]] + list(FIXED_SCHEMES[target])


def resolve_scheme(
    request: ConversionRequest, widths: Mapping[str, int], sized: Mapping[str, int] | None = None
) -> TargetScheme:
    """The scheme that a request means for modules with these in_features. UsageError naming what does not fit.

    `sized` are those that an automatic group size has to fit, if they are others."""
    target = request.to
    name = request.scheme or _default_name(request)
    if target == "aqlm" and name is not None and (match := _CODEBOOKS.fullmatch(name)):
        _refuse_contradictions(request, name)
        return _additive_scheme(match, widths)
    if name is not None and name not in scheme_names(target):
        raise UsageError(f"{target} has no scheme {name!r}", hint=_suggestion(name, scheme_names(target)))
    if name is not None and name in FIXED_SCHEMES[target]:
        return _fixed_scheme(request, name)
    bits = _bits(request, name)
    size = _group_size(request, widths, widths if sized is None else sized)
    if target == "hqq" and request.solver == "hqq":  # real zero points, which nothing else makes
        if request.symmetric:
            raise UsageError(
                "solver hqq finds zero points, which --symmetric has none of", hint="leave one of them out"
            )
        return AffineScheme(bits, size)
    symmetric = target in SYMMETRIC_BY_DEFAULT if request.symmetric is None else request.symmetric
    return IntegerScheme(bits, size, symmetric)


def resolve_solver(request: ConversionRequest, scheme: TargetScheme) -> Solver:
    """The solver for a scheme. UsageError if the one asked for cannot make it."""
    solver = find_solver(request.solver or _default_solver(request, scheme))
    reason = solver.obstacle(scheme)
    if reason is not None:
        raise UsageError(f"solver {solver.name} {reason}", hint=f"leave --solver out, or give {_able(scheme)}")
    if request.samples == 0 and solver.data == "needed":
        able = [other.name for other in SOLVERS.values() if other.obstacle(scheme) is None and other.data != "needed"]
        raise UsageError(
            f"solver {solver.name} needs calibration, but samples = 0",
            hint=f"solvers that need no calibration data: {', '.join(able)}" if able else None,
        )
    return solver


def needs_calibration(scheme: TargetScheme, solver: Solver, samples: int) -> bool:
    """Whether activations have to be seen. At 8 bits rtn takes each range as it is."""
    inputs = getattr(scheme, "activations", None)
    if inputs is not None and (not inputs.dynamic or getattr(scheme, "has_input_scale", False)):
        return True
    if solver.data != "used":
        return solver.data == "needed"
    nearly_exact = isinstance(scheme, IntegerScheme) and scheme.bits == NEARLY_EXACT_BITS
    return samples > 0 and not nearly_exact and not isinstance(scheme, FloatScheme)


def is_trainable(scheme: TargetScheme) -> bool:
    """Whether steps of training can move the numbers of such weights."""
    return isinstance(scheme, IntegerScheme | AdditiveScheme)


def training_steps(
    request: ConversionRequest, schemes: Collection[TargetScheme], *, calibrates: bool, has_experts: bool = False
) -> tuple[int, int]:
    """Steps of (refinement, distillation): those asked for, or what the effort gives where training can help."""
    asked = (request.refine_steps, request.distill_steps)
    trainable = [scheme for scheme in schemes if is_trainable(scheme)]
    trains = calibrates and bool(trainable)
    if not trains and any(asked):
        option = "--refine-steps" if request.refine_steps else "--distill-steps"
        why = "--samples 0 gives none" if trainable else f"{', '.join(map(str, dict.fromkeys(schemes)))} has none"
        raise UsageError(f"{option} moves codes, codebooks and scales by calibration text, but {why}")
    if has_experts:
        if any(asked):
            option = "--refine-steps" if request.refine_steps else "--distill-steps"
            raise UsageError(f"{option} trains no model whose blocks have experts", hint=f"leave out {option}")
        return 0, 0
    effort = find_effort(request.effort)
    exact = all(isinstance(scheme, IntegerScheme) and scheme.bits >= NEARLY_EXACT_BITS for scheme in trainable)
    wanted = trains and not exact
    by_effort = (effort.refine_steps, effort.distill_steps) if wanted else (0, 0)
    refine, distill = (given if own is None else own for own, given in zip(asked, by_effort, strict=True))
    return refine, distill


def _default_name(request: ConversionRequest) -> str | None:
    """The scheme that is meant where none is named; None leaves it to bits and group size."""
    if request.whole_bits == DEFAULT_BITS and request.to in FOUR_BIT_SCHEMES:
        return FOUR_BIT_SCHEMES[request.to]
    return DEFAULT_SCHEMES.get(request.to)


def _fixed_scheme(request: ConversionRequest, name: str) -> TargetScheme:
    scheme = FIXED_SCHEMES[request.to][name]
    if not isinstance(scheme, LookupScheme) or not scheme.flattened:
        _refuse_contradictions(request, name, getattr(scheme, "bits", 8))
        return scheme
    _refuse_contradictions(replace(request, group_size=None), name, scheme.bits)
    return scheme if request.group_size is None else replace(scheme, block_size=_flat_block(request.group_size))


def _flat_block(size: int) -> int:
    """A block size that bitsandbytes has."""
    if size not in BLOCK_SIZES:
        raise UsageError(f"--group-size {size}: the blocks of bitsandbytes are {', '.join(map(str, BLOCK_SIZES))}")
    return size


def _default_solver(request: ConversionRequest, scheme: TargetScheme) -> str:
    if isinstance(scheme, AdditiveScheme):
        return ADDITIVE_SOLVER
    if isinstance(scheme, AffineScheme):
        return "hqq"
    if isinstance(scheme, FloatScheme) or request.samples == 0:
        return "rtn"
    if isinstance(scheme, IntegerScheme) and scheme.bits == NEARLY_EXACT_BITS:
        return "rtn" if scheme.activations is None else "smoothquant"
    effort = find_effort(request.effort)
    has_few_bits = isinstance(scheme, IntegerScheme) and scheme.bits <= FEW_BITS
    return effort.few_bits_solver if has_few_bits else effort.solver


def _able(scheme: TargetScheme) -> str:
    """The solvers that make a scheme, in words."""
    *first, last = [solver.name for solver in SOLVERS.values() if solver.obstacle(scheme) is None]
    return f"{', '.join(first)} or {last}" if first else last


def _additive_scheme(match: re.Match[str], widths: Mapping[str, int]) -> AdditiveScheme:
    """As its name says: codebooks x bits of a code, and g with the inputs of a group (8 unless given)."""
    books, bits, group = int(match[1]), int(match[2]), int(match[3] or AdditiveScheme.in_group)
    if bits > _MAX_CODEBOOK_BITS:
        raise UsageError(f"--scheme {match[0]}: codes may have at most {_MAX_CODEBOOK_BITS} bits, not {bits}")
    scheme = AdditiveScheme(books, bits, 1, group)
    module = _misfit(group, widths)
    if module is not None:
        raise UsageError(f"{module}: in_features = {widths[module]} must be divisible by the group of {group} inputs")
    return scheme


def _bits(request: ConversionRequest, name: str | None) -> int:
    allowed = WEIGHT_ONLY_BITS[request.to]
    named = int(name[1 : name.index("a")]) if name else None
    bits = named or request.whole_bits or (DEFAULT_BITS if DEFAULT_BITS in allowed else allowed[0])
    if request.whole_bits not in (None, bits):
        raise UsageError(f"--scheme {name} has {bits} bits, but --bits {request.whole_bits} was given")
    if bits not in allowed:
        able = [target for target, widths in WEIGHT_ONLY_BITS.items() if bits in widths]
        hint = f"{' and '.join(able)} can hold {bits} bits" if able else None
        raise UsageError(f"{request.to} holds {' or '.join(map(str, allowed))} bits, not {bits}", hint=hint)
    return bits


def _group_size(request: ConversionRequest, widths: Mapping[str, int], sized: Mapping[str, int]) -> int | None:
    if request.group_size == PER_ROW:
        return None
    if request.group_size is None:
        return next((size for size in AUTOMATIC_GROUP_SIZES if _misfit(size, sized) is None), None)
    module = _misfit(request.group_size, widths)
    if module is not None:
        raise UsageError(
            f"{module}: in_features = {widths[module]} must be divisible by group_size = {request.group_size}",
            hint=f"--group-size {_choices(widths)} fit all layers, and -1 (one group a row)",
        )
    return request.group_size


def _misfit(size: int, widths: Mapping[str, int]) -> str | None:
    """The first module that a group size does not divide."""
    return next((module for module, width in widths.items() if width % size), None)


def _choices(widths: Mapping[str, int]) -> str:
    """The group sizes that divide all widths: multiples of 32 if there are any."""
    common = math.gcd(*widths.values())
    divisors = [size for size in range(8, common + 1) if common % size == 0 and size % 8 == 0]
    usual = [size for size in divisors if size % 32 == 0]
    return ", ".join(map(str, usual or divisors or [common]))


def _refuse_contradictions(request: ConversionRequest, name: str, bits: int = 8) -> None:
    checks: dict[str, Callable[[], bool]] = {
        "--bits": lambda: request.whole_bits not in (None, bits),
        "--group-size": lambda: request.group_size not in (None, PER_ROW),
    }
    for option, contradicts in checks.items():
        if contradicts():
            raise UsageError(f"{option} does not go with the scheme {name} of {request.to}, which fixes it")


def _suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    listed = f"its schemes are {', '.join(known)}"
    return f"Did you mean {near[0]!r}? {listed}" if near else listed
