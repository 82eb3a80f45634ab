"""Regular expressions in configs that backtrack without end, or are none: refused by name, within a second or so."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from aphroquant.errors import InputError
from aphroquant.formats import detect_format, reading
from aphroquant.formats.base import TensorHeader

MODULE = "model.layers.0.self_attn.q_proj"
LONG = MODULE + "." + "a" * 60
ENDLESS = [r"(.*?)*Z|(.+)+Y", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(a|a|b)*c|(\w+\s?)*!", r"(x+x+)+y|(?:.*.*.*.*.*.*)*Q"]
NONE = ["(", "[", "*", "(?P<a", "(" * 500, "a" * 100_000, r"\p{L}", "(?R)", "(?<=a+)b", "x{99999999999}"]


def config(method: str, pattern: str) -> dict[str, Any]:
    if method == "gptq":
        return {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {f"+:{pattern}": {"bits": 8}}}
    if method == "auto-round":
        return {"quant_method": "auto-round", "bits": 4, "group_size": 32, "extra_config": {f"{pattern}": {"bits": 8}}}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    targets = [f"re:{pattern}"] if method == "targets" else ["Linear"]
    ignore = [f"re:{pattern}"] if method == "ignore" else []
    groups = {"group_0": {"targets": targets, "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ignore}


def scheme(method: str, pattern: str) -> object:
    headers = {
        "qweight": TensorHeader(torch.int32, (8, 16)),
        "qzeros": TensorHeader(torch.int32, (2, 2)),
        "scales": TensorHeader(torch.float16, (2, 16)),
        "weight_packed": TensorHeader(torch.int32, (16, 8)),
        "weight_scale": TensorHeader(torch.float16, (16, 2)),
        "weight_shape": TensorHeader(torch.int64, (2,)),
    }
    found = config(method, pattern)
    return detect_format(found).from_config(found).scheme(LONG, headers)


@pytest.mark.parametrize("method", ["gptq", "auto-round", "targets", "ignore"])
@pytest.mark.parametrize("pattern", ENDLESS)
def test_a_pattern_that_backtracks_without_end_is_stopped(method: str, pattern: str) -> None:
    began = time.monotonic()
    try:
        scheme(method, pattern)
    except InputError as error:
        assert "takes more than 0.25 seconds" in error.message or "contradict" in error.message or LONG in error.message
    assert time.monotonic() - began < 20  # of a busy machine


def test_one_such_pattern_is_told() -> None:
    with pytest.raises(InputError, match=r"'\(\.\*\?\)\*Z\|\(\.\+\)\+Y' takes more than 0.25 seconds") as raised:
        reading.matches(ENDLESS[0], LONG)
    assert raised.value.hint == "write the pattern without repetitions inside repetitions"


@pytest.mark.parametrize("pattern", NONE)
def test_what_re_does_not_take_for_an_expression_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=r"is not a regular expression|characters, at most 2000"):
        reading.matches(pattern, MODULE)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*\.0\.self_attn\..*", True),
        (r"model\.layers\.(0|1)\.", True),
        (r"layers", False),
        (r"^model.*q_proj$", True),
        (r".*mlp.*", False),
        (r"(?i)MODEL\.", True),
        (r"model(?!\.layers\.1)", True),
        ("", True),
    ],
)
def test_patterns_match_from_the_start_of_a_name_as_re_does(pattern: str, expected: bool) -> None:
    import re

    assert reading.matches(pattern, MODULE) is expected
    assert (re.match(pattern, MODULE) is not None) is expected
