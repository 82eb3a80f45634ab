"""Names of formats, and which one a quantization_config means."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import FORMATS, detect_format, format_class


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_is_that_of_its_format(name: str) -> None:
    assert format_class(name).name == format_class(name).quant_method == name
    assert FORMATS[name]() is format_class(name)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown format 'gtpq'") as raised:
        format_class("gtpq")
    assert raised.value.hint == f"Did you mean 'gptq'? the formats are {', '.join(FORMATS)}"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
        ({"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True}, "gptq"),
        ({"config_groups": {}, "format": "pack-quantized"}, "compressed-tensors"),
    ],
)
def test_a_config_is_told_by_its_method_or_its_keys(config: dict[str, Any], name: str) -> None:
    assert detect_format(config).name == name


@pytest.mark.parametrize("config", [{}, {"quant_method": "quip"}, {"quant_method": ["awq"]}, {"bits": 4}])
def test_other_methods_are_unreadable_and_the_readable_ones_listed(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="quant_method") as raised:
        detect_format(config)
    assert raised.value.hint == f"readable are {', '.join(FORMATS)}"


def test_listing_the_names_does_not_import_torch() -> None:
    code = "import sys, aphroquant.formats as f; assert 'awq' in f.FORMATS; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
