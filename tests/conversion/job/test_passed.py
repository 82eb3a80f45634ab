"""Passed blocks come back from records as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aphroquant.calibration.solution import Solution
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.conversion.job.passed import pack_passed, unpack_passed
from aphroquant.conversion.job.record import read_record, write_record
from aphroquant.conversion.passed import PassedBlock
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
    TrellisScheme,
)

SCHEMES: list[Scheme] = [
    IntegerScheme(4, 64, symmetric=False),
    IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int")),
    FloatScheme("block", (128, 128), ActivationScheme("float", granularity="group", group_size=128)),
    FloatScheme("tensor", dtype=torch.float8_e5m2),
    LookupScheme("nf4", 64, "float"),
    AdditiveScheme(2, 8),
    AffineScheme(3, 64),
    KQuantScheme("q4_k"),
    TrellisScheme(2.5, "mul1"),
    DenseScheme(torch.bfloat16),
]


def block() -> SolvedBlock:
    solutions = {
        f"model.layers.3.{number}": Solution(
            QuantizedWeight(scheme, {"codes": torch.randint(0, 9, (4, 6)), "scales": torch.rand(4)}, (4, 6)),
            0.1 * number,
            {"rounding": "gptq", "damping": 0.1 + 0.2},
            ("the Hessian is nearly singular",) * (number % 2),
        )
        for number, scheme in enumerate(SCHEMES)
    }
    changed = {"model.layers.3.input_layernorm.weight": torch.randn(6, dtype=torch.float16)}
    return SolvedBlock(3, solutions, changed, {"self_attn.o_proj": {"ratio": 0.3}}, {"loss_after": 1e-9})


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    before = block()
    statistics = {"q_proj": InputStatistics(7, torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6, 6))}
    written = write_record(tmp_path, "block", 3, *pack_passed(PassedBlock(3, [before, SolvedBlock(3, {})], statistics)))
    passed = unpack_passed(read_record(written))
    after, nothing = passed.solved
    assert not nothing.solutions
    assert list(after.solutions) == list(before.solutions)
    for module, solution in before.solutions.items():
        found = after.solutions[module]
        assert found.weight.scheme == solution.weight.scheme
        assert all(torch.equal(found.weight[name], tensor) for name, tensor in solution.weight.tensors.items())
        assert replace(found, weight=solution.weight) == solution
    assert all(torch.equal(after.changed[name], tensor) for name, tensor in before.changed.items())
    assert (after.layer, after.scaling, after.refinement) == (before.layer, before.scaling, before.refinement)
    same = zip(passed.statistics["q_proj"][1:], statistics["q_proj"][1:], strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in same)
    assert passed.statistics["q_proj"].num_tokens == 7


def test_a_report_that_json_cannot_hold_is_our_own_mistake(tmp_path: Path) -> None:
    odd = SolvedBlock(0, {}, scaling={"a": {"ratio": object()}})
    with pytest.raises(TypeError):
        write_record(tmp_path, "block", 0, *pack_passed(PassedBlock(0, [odd], {})))
