"""What every writer checks: that the target holds a scheme, and its numbers, exactly. All raise UsageError."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.numbers import largest_byte
from aphroquant.schemes import DenseScheme, IntegerScheme, QuantizedWeight, Scheme

LM_HEAD = "lm_head"
REQUANTIZE = "these weights can only be dequantized and quantized anew for this format, with a loss"


def quantized(schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The modules that are not dense."""
    return {module: scheme for module, scheme in schemes.items() if not isinstance(scheme, DenseScheme)}


def left_dense(schemes: Mapping[str, Scheme], dense_modules: list[str]) -> list[str]:
    """`dense_modules` and those whose scheme says so."""
    named = [module for module, scheme in schemes.items() if isinstance(scheme, DenseScheme)]
    return list(dict.fromkeys([*dense_modules, *named]))


def left_dense_with_head(schemes: Mapping[str, Scheme], dense_modules: list[str]) -> list[str]:
    """The same and lm_head, unless it is quantized: a tied head has no tensor, but readers still meet the module."""
    dense = left_dense(schemes, dense_modules)
    return dense if LM_HEAD in dense or LM_HEAD in schemes else [*dense, LM_HEAD]


def weight_only_integer(target: str, module: str, scheme: Scheme, bits: tuple[int, ...]) -> IntegerScheme:
    """The scheme, if it is one of codes, scales and zeros that `target` holds at one of `bits`."""
    if not isinstance(scheme, IntegerScheme):
        raise UsageError(f"{module}: {target} holds integer codes, not {scheme}", hint=REQUANTIZE)
    if scheme.bits not in bits:
        widths = ", ".join(str(width) for width in bits)
        raise UsageError(f"{module}: {target} holds {widths} bits, not {scheme.bits}", hint=REQUANTIZE)
    if scheme.has_offsets:
        raise UsageError(f"{module}: {target} holds integer zero points, not real-valued offsets", hint=REQUANTIZE)
    if scheme.activations is not None:
        raise UsageError(
            f"{module}: {target} has no quantized inputs, which {scheme} needs", hint="write compressed-tensors"
        )
    return scheme


def same_for_all(target: str, what: str, values: Mapping[str, Any]) -> None:
    """Refuse modules that differ in something that the target has only once."""
    first = next(iter(values), None)
    for module, value in values.items():
        if first is not None and value != values[first]:
            raise UsageError(
                f"{target} has one {what} for all modules, but {first} has {values[first]} and {module} {value}",
                hint="write compressed-tensors or gptq, which hold mixed settings",
            )


def checked(module: str, weight: QuantizedWeight, expected: Scheme) -> None:
    """Refuse a weight of another scheme than announced, of wrong shapes, or with codes wider than its bits."""
    if weight.scheme != expected:
        raise UsageError(f"{module}: the weight is {weight.scheme}, but {expected} was announced for it")
    weight.check(module)
    for name, tensor in weight.tensors.items():
        bits = weight.scheme.storage_bits(name)
        if bits is None or tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dtype == torch.uint8:
            lowest, highest = 0, largest_byte(tensor)
        else:
            lowest, highest = int(tensor.min()), int(tensor.max())
        if lowest < 0 or highest >= 2**bits:
            value = lowest if lowest < 0 else highest
            raise UsageError(f"{module}: {name} has the value {value}, the limit is {2**bits - 1}")


def require_multiple(target: str, module: str, what: str, size: int, divisor: int) -> None:
    if size % divisor:
        raise UsageError(
            f"{module}: {target} needs {what} = {size} to be a multiple of {divisor}",
            hint="compressed-tensors holds layers of any shape; or leave this one dense with --ignore",
        )


def exact_cast(target: str, module: str, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as `dtype`, refused unless every value is finite and stays what it is."""
    cast = tensor.to(dtype)
    changed = (cast.double() != tensor.double()) | ~tensor.isfinite()
    if changed.any():
        first = changed.nonzero()[0].tolist()
        value, nearest = float(tensor[tuple(first)]), float(cast[tuple(first)])
        short = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"{module}: {name}{first} = {value!r} {_misfit(value, nearest, dtype)}, and {target} stores {short}",
            hint="compressed-tensors keeps scales in float16, bfloat16 and float32; or " + REQUANTIZE,
        )
    return cast.contiguous()


def _misfit(value: float, nearest: float, dtype: torch.dtype) -> str:
    """Why a value is not among a dtype's numbers, of which `nearest` is the one that it would become."""
    short, limits = str(dtype).removeprefix("torch."), torch.finfo(dtype)
    if not math.isfinite(value):
        return "is no finite number"
    if abs(value) > limits.max:
        return f"is beyond the largest {short} ({limits.max:g})"
    if abs(value) < limits.tiny:
        return f"is below the range of {short} (it would become {nearest:g})"
    return f"is between two numbers of {short} (the nearest is {nearest!r})"
