"""AWQ's layouts "gemv" and "gemv_fast": the sentences of their specification, packed here one code at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphroquant.errors import InputError
from aphroquant.formats.awq import Awq
from aphroquant.formats.base import TensorHeader
from aphroquant.schemes import IntegerScheme

P = "model.layers.0.mlp.up_proj"
SHAPES = [(8, 64, 32, 4), (16, 128, 64, 2), (8, 384, 128, 1), (4, 2304, 128, 3), (12, 192, -1, 1)]  # N, K, G, words


def weight(n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [N, K], zeros [N, groups], scales [N, groups])."""
    groups = 1 if group == -1 else k // group
    zeros = torch.randint(0, 16, (n, groups))
    zeros[0, 0], zeros[-1, -1] = 0, 15
    return torch.randint(0, 16, (n, k)), zeros, (torch.rand(n, groups) * 0.1 + 1e-4).half()


def filled(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def signed(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def nibbles_in_order(codes: torch.Tensor) -> torch.Tensor:
    words = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            fields = codes[row, 8 * word : 8 * word + 8].tolist()
            words[row, word] = signed(sum(field << 4 * place for place, field in enumerate(fields)), 32)
    return words


def four_rows_a_word(codes: torch.Tensor) -> torch.Tensor:
    """Nibble j of word w of each 64 columns is code 4w + j of the four rows' 64 columns laid end to end."""
    rows, columns = codes.shape
    words = torch.empty(rows // 4, columns, dtype=torch.int16)
    for quad in range(rows // 4):
        for begin in range(0, columns, 64):
            line = []
            for row in range(4 * quad, 4 * quad + 4):
                for block in (begin, begin + 32):
                    line += [int(codes[row, block + 8 * (i % 4) + i // 4]) for i in range(32)]
            for word in range(64):
                fields = line[4 * word : 4 * word + 4]
                words[quad, begin + word] = signed(sum(field << 4 * place for place, field in enumerate(fields)), 16)
    return words


def stored(version: str, n: int, k: int, group: int, words: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(tensors of the layout, the weight in float32)."""
    codes, zeros, scales = weight(n, k, group)
    size = k if group == -1 else group
    exact = (codes - zeros.repeat_interleave(size, 1)).float() * scales.float().repeat_interleave(size, 1)
    wide = filled(scales, 8 * words)
    if version == "gemv":
        packed = nibbles_in_order(filled(zeros, 8 * words))
        return {"qweight": nibbles_in_order(codes), "qzeros": packed, "scales": wide}, exact
    scaled = filled(-(scales.float() * zeros.float()).half(), 8 * words)
    tensors = {"qweight": four_rows_a_word(codes), "qzeros": scaled.T.contiguous(), "scales": wide.T.contiguous()}
    return tensors, exact


def reader(version: str, group: int, **more: Any) -> Awq:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
    return Awq.from_config(config | more)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
@pytest.mark.parametrize(("n", "k", "group", "words"), SHAPES)
def test_every_code_and_zero_point_is_found(version: str, n: int, k: int, group: int, words: int) -> None:
    tensors, exact = stored(version, n, k, group, words)
    found = reader(version.upper(), group).read(P, tensors)
    found.check(P)
    assert found.scheme == IntegerScheme(4, None if group == -1 else group, symmetric=False)
    assert torch.equal(found.dequantize(), exact)


def test_the_older_name_of_scaled_zero_points_is_known() -> None:
    tensors, exact = stored("gemv_fast", 8, 64, 32, 4)
    tensors["scaled_zeros"] = tensors.pop("qzeros")
    assert torch.equal(reader("gemv_fast", 32).read(P, tensors).dequantize(), exact)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_a_symmetric_checkpoint_must_have_zero_points_of_8(version: str) -> None:
    tensors, _ = stored(version, 8, 64, 32, 4)
    with pytest.raises(InputError, match="the zero points are not all 8"):
        reader(version, 32, sym=True).read(P, tensors)


def test_scaled_zero_points_that_are_no_multiple_are_refused() -> None:
    tensors, _ = stored("gemv_fast", 8, 64, 32, 4)
    tensors["qzeros"][1, 5] *= 1.01
    tensors["qzeros"][1, 5] -= 0.003
    with pytest.raises(InputError, match=r"up_proj\.qzeros: the value .* of row 5, group 1 is not minus the scale"):
        reader("gemv_fast", 32).read(P, tensors)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("gemv", {"qzeros": TensorHeader(torch.int32, (8, 1))}, r"qzeros has shape \[8, 1\]"),
        ("gemv", {"qweight": TensorHeader(torch.int16, (8, 8))}, "qweight has dtype int16"),
        ("gemv", {"qweight": TensorHeader(torch.int32, (8, 9))}, "group_size = 32 with in_features = 72"),
        ("gemv_fast", {"qweight": TensorHeader(torch.int16, (2, 96))}, "has 96 columns"),
        ("gemv_fast", {"scales": TensorHeader(torch.float16, (2, 8))}, r"scales has shape \[2, 8\]"),
    ],
)
def test_headers_that_contradict_are_refused(version: str, change: dict[str, TensorHeader], message: str) -> None:
    tensors, _ = stored(version, 8, 64, 32, 4)
    headers = {name: TensorHeader(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with pytest.raises(InputError, match=message):
        reader(version, 32).scheme(P, headers | change)


def test_other_group_sizes_and_runtime_layouts_are_refused() -> None:
    headers = {"qweight": TensorHeader(torch.int32, (8, 8))}
    with pytest.raises(InputError, match=r"group_size = 16 .* is none of AWQ gemv's"):
        reader("gemv", 16).scheme(P, headers)
    with pytest.raises(InputError, match="AWQ version 'marlin' is not readable; gemm, gemv, gemv_fast are"):
        reader("marlin", 32)
