"""Patterns for modules: they match what they are for, its fused name, and nothing else."""

from __future__ import annotations

import re

import pytest

from aphroquant.formats.patterns import exactly

BLOCK = "model.layers.1"
ATTENTION = [f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
EXPERTS = [f"{BLOCK}.mlp.experts.{number}.{name}_proj" for number in range(12) for name in ("gate", "up", "down")]
ELSEWHERE = [name.replace("layers.1", "layers.11") for name in [*ATTENTION, *EXPERTS]] + ["lm_head", "x.lm_head"]


@pytest.mark.parametrize(
    ("modules", "others", "fused"),
    [
        (ATTENTION, EXPERTS, [f"{BLOCK}.self_attn.qkv_proj"]),
        (ATTENTION[:2], ATTENTION[2:], []),
        (ATTENTION[:3], ATTENTION[3:], [f"{BLOCK}.self_attn.qkv_proj"]),
        (["lm_head"], ATTENTION, []),
        ([f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"], [], [f"{BLOCK}.mlp.gate_up_proj"]),
        (EXPERTS, ATTENTION, [f"{BLOCK}.mlp.experts"]),
        (EXPERTS[2::3], [name for name in EXPERTS if "down" not in name], []),
        (EXPERTS[:3], EXPERTS[3:], []),
        (EXPERTS[:4], EXPERTS[4:], []),
    ],
)
def test_patterns_match_their_modules_and_layers_fused_of_them_only(
    modules: list[str], others: list[str], fused: list[str]
) -> None:
    patterns = exactly(modules, others)
    asked = {*modules, *others, *ELSEWHERE, f"{BLOCK}.mlp.experts", f"{BLOCK}.mlp.gate_up_proj"}
    asked.add(f"{BLOCK}.self_attn.qkv_proj")
    found = {module for module in asked if any(re.match(pattern, module) for pattern in patterns)}
    assert found == {*modules, *fused}


def test_many_experts_that_are_alike_take_one_pattern() -> None:
    assert len(exactly(EXPERTS, ATTENTION)) == 1
