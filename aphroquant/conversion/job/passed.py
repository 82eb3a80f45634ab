"""Passed blocks as records: their numbers as canonical tensors, the rest as JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from aphroquant.calibration.solution import Solution
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.conversion.job.record import Record
from aphroquant.conversion.passed import PassedBlock
from aphroquant.schemes import ActivationScheme, QuantizedWeight, Scheme

_CHANGED, _SOLUTIONS, _STATISTICS = "changed", "solutions", "statistics"
_WITH_TENSORS = ("layer", "solutions", "changed")
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (*get_args(Scheme), ActivationScheme)}


def pack_passed(passed: PassedBlock) -> Record:
    """What `unpack_passed` makes the same of."""
    tensors: dict[str, Tensor] = {}
    solved = []
    for branch, block in enumerate(passed.solved):
        own, facts = _pack_solved(block)
        tensors |= {f"{branch}/{name}": tensor for name, tensor in own.items()}
        solved.append(facts)
    statistics = {}
    for module, found in passed.statistics.items():
        told = found._asdict()
        statistics[module] = told.pop("num_tokens")
        tensors |= {f"{_STATISTICS}/{module}/{name}": t.cpu() for name, t in told.items() if t is not None}
    return Record(tensors, {"layer": passed.layer, "solved": solved, "statistics": statistics})


def unpack_passed(record: Record) -> PassedBlock:
    """What a record holds."""
    tensors, facts = record
    solved = []
    for branch, told in enumerate(facts["solved"]):
        prefix = f"{branch}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        solved.append(_unpack_solved(own, told))
    statistics = {}
    for module, num_tokens in facts["statistics"].items():
        prefix = f"{_STATISTICS}/{module}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        statistics[module] = InputStatistics(num_tokens, **own)
    return PassedBlock(facts["layer"], solved, statistics)


def _pack_solved(solved: SolvedBlock) -> Record:
    tensors = {f"{_CHANGED}/{name}": tensor for name, tensor in solved.changed.items()}
    solutions = []
    for module, solution in solved.solutions.items():
        weight = solution.weight
        tensors |= {f"{_SOLUTIONS}/{module}/{name}": tensor for name, tensor in weight.tensors.items()}
        solutions.append(
            {
                "module": module,
                "scheme": _as_json(weight.scheme),
                "shape": list(weight.shape),
                "tensors": list(weight.tensors),
                "relative_error": solution.relative_error,
                "details": solution.details,
                "warnings": list(solution.warnings),
                "square_sum": solution.square_sum,
            }
        )
    others = {each.name: getattr(solved, each.name) for each in fields(solved) if each.name not in _WITH_TENSORS}
    facts = {"layer": solved.layer, "solutions": solutions, "changed": list(solved.changed), "others": others}
    return Record(tensors, facts)


def _unpack_solved(tensors: dict[str, Tensor], facts: dict[str, Any]) -> SolvedBlock:
    solutions = {}
    for told in facts["solutions"]:
        module: str = told["module"]
        rows, columns = told["shape"]
        own: dict[str, Tensor] = {name: tensors[f"{_SOLUTIONS}/{module}/{name}"] for name in told["tensors"]}
        weight = QuantizedWeight(_from_json(told["scheme"]), own, (rows, columns))
        solutions[module] = Solution(
            weight, told["relative_error"], told["details"], tuple(told["warnings"]), told["square_sum"]
        )
    changed = {name: tensors[f"{_CHANGED}/{name}"] for name in facts["changed"]}
    return SolvedBlock(facts["layer"], solutions, changed, **facts["others"])


def _as_json(value: Any) -> Any:
    """A scheme, or a field of one."""
    if is_dataclass(value):
        own = {each.name: _as_json(getattr(value, each.name)) for each in fields(value)}
        return {"kind": type(value).__name__, "fields": own}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return _KINDS[value["kind"]](**{name: _from_json(own) for name, own in value["fields"].items()})
