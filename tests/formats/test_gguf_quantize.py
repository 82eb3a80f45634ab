"""Encoders of GGUF types: errors beside those of rounding to extremes and of llama.cpp; what holds for any input.

Root mean square errors of 64 x 4096 normally distributed numbers (seed 0), measured with ggml_quantize_chunk of the
llama.cpp in xllamacpp 2026.10.11549; "extremes" sets each block's scale (and minimum) from its largest (and smallest)
element:

           ours     llama.cpp  extremes
    Q4_0   0.08110  0.08612    0.08612
    Q4_1   0.06955  0.07855    0.07855
    Q5_0   0.04002  0.04274    0.04274
    Q5_1   0.03389  0.03794    0.03794
    Q8_0   0.00535  0.00536    0.00536
    Q2_K   0.26033  0.29775    0.32942
    Q3_K   0.14375  0.15097    0.15510
    Q4_K   0.07026  0.07159    0.07867
    Q5_K   0.03510  0.03614    0.03822
    Q6_K   0.01666  0.01775    0.01877
    MXFP4  0.11155  0.11473    0.11473
    IQ4_NL 0.07344  0.07617
"""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.errors import InputError, UsageError
from aphroquant.formats.gguf import block_type, decode, encode, quantize

LLAMA_CPP = {
    "Q4_0": 0.086124,
    "Q4_1": 0.078549,
    "Q5_0": 0.042738,
    "Q5_1": 0.037942,
    "Q8_0": 0.005355,
    "Q2_K": 0.297747,
    "Q3_K": 0.150971,
    "Q4_K": 0.071592,
    "Q5_K": 0.036140,
    "Q6_K": 0.017747,
    "MXFP4": 0.114726,
    "IQ4_NL": 0.076170,
}
GGUF_PY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]  # what gguf-py can encode


def rmse(found: torch.Tensor, expected: torch.Tensor, weights: torch.Tensor | float = 1.0) -> float:
    return float(((found - expected).double().square() * weights).mean().sqrt())


def theirs(name: str, dense: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(dense.numpy(), kind), kind))


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_errors_on_normal_numbers_are_below_llama_cpps(name: str) -> None:
    dense = torch.randn(64, 4096)
    error = rmse(quantize(block_type(name), dense).dequantize(), dense)
    assert error < LLAMA_CPP[name], f"{error:.6f}"


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize(("size", "times"), [(1e-3, 1.05), (1e-4, 1.1), (1e-5, 1.5)])
def test_subnormal_factors_of_small_weights_cost_little(name: str, size: float, times: float) -> None:
    """The largest weight of a block of Q6_K is 4096 factors, and float16 begins at 6e-8."""
    dense = torch.randn(16, 512)
    dense /= dense.abs().max()
    whole, small = (quantize(block_type(name), dense * by).dequantize() / by for by in (1.0, size))
    assert rmse(small, dense) < times * rmse(whole, dense)


@pytest.mark.parametrize("name", GGUF_PY)
@pytest.mark.parametrize("kind", ["heavy tails", "positive", "one outlier", "tiny"])
def test_errors_are_at_most_gguf_pys_on_odd_weights(name: str, kind: str) -> None:
    dense = {
        "heavy tails": torch.randn(16, 256) / torch.rand(16, 256).clamp(min=1e-3).sqrt(),
        "positive": torch.rand(16, 256) + 1,
        "one outlier": torch.randn(16, 256) + torch.eye(16, 256) * 100,
        "tiny": torch.randn(16, 256) * 1e-3,
    }[kind]
    ours = rmse(quantize(block_type(name), dense).dequantize(), dense)
    assert ours <= rmse(theirs(name, dense), dense) * 1.001, f"{ours:.6g}"


@pytest.mark.sample_model
@pytest.mark.parametrize("name", GGUF_PY)
def test_errors_on_real_weights_are_at_most_gguf_pys(name: str, sample_model: object) -> None:
    from pathlib import Path

    from aphroquant.checkpoint import open_checkpoint

    assert isinstance(sample_model, Path)
    dense = open_checkpoint(sample_model).weight("model.layers.9.mlp.down_proj").dequantize()[:64]
    ours = rmse(quantize(block_type(name), dense).dequantize(), dense)
    assert ours <= rmse(theirs(name, dense), dense) * 1.001, f"{ours:.6g}"


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_gguf_py_reads_the_encoded_bytes_as_the_numbers_that_were_meant(name: str) -> None:
    kind = block_type(name)
    weight = quantize(kind, torch.randn(5, 768))
    weight.check("weight")
    data = encode(kind, weight)
    expected = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(decode(kind, data.flatten(), (5, 768)).dequantize(), expected)


@pytest.mark.parametrize("name", [name for name in LLAMA_CPP if name not in ("Q8_0", "MXFP4")])
def test_importance_moves_the_error_to_columns_that_matter_less(name: str) -> None:
    dense, importance = torch.randn(32, 1024), torch.randn(1024).mul(1.5).exp()
    plain = quantize(block_type(name), dense).dequantize()
    weighted = quantize(block_type(name), dense, importance).dequantize()
    assert rmse(weighted, dense, importance) < 0.98 * rmse(plain, dense, importance)
    assert rmse(weighted, dense) > rmse(plain, dense)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_equal_importance_is_no_importance_whatever_its_size(name: str) -> None:
    dense = torch.randn(4, 512)
    plain = encode(block_type(name), quantize(block_type(name), dense))
    for importance in (torch.zeros(512), torch.full((512,), 1e12)):
        found = quantize(block_type(name), dense, importance).dequantize()
        assert rmse(found, decode(block_type(name), plain.flatten(), (4, 512)).dequantize()) < 1e-2


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_extreme_importance_leaves_every_element_within_its_blocks_range(name: str) -> None:
    dense, importance = torch.randn(8, 512), torch.randn(512).mul(8).exp()
    found = quantize(block_type(name), dense, importance).dequantize()
    assert found.isfinite().all()
    assert found.abs().max() < 3 * dense.abs().max()


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_zeros_stay_zeros(name: str) -> None:
    assert not quantize(block_type(name), torch.zeros(2, 256)).dequantize().any()


@pytest.mark.parametrize("name", [name for name in LLAMA_CPP if name not in ("MXFP4", "IQ4_NL", "Q3_K")])
@pytest.mark.parametrize("value", [1.0, -3.0, 0.01])
def test_a_constant_weight_comes_back(name: str, value: float) -> None:
    dense = torch.full((2, 256), value)
    assert quantize(block_type(name), dense).dequantize().numpy() == pytest.approx(dense.numpy(), rel=5e-3)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    dense = torch.randn(3, 512)
    dense[1] *= 1000
    whole = encode(block_type(name), quantize(block_type(name), dense))
    alone = [encode(block_type(name), quantize(block_type(name), row[None])) for row in dense]
    assert torch.equal(whole, torch.cat(alone))


def test_many_rows_go_through_in_chunks() -> None:
    dense = torch.randn(3000, 256)
    whole = quantize(block_type("Q4_0"), dense)
    assert torch.equal(quantize(block_type("Q4_0"), dense[2500:])["codes"], whole["codes"][2500:])


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_types_are_plain_casts(name: str) -> None:
    dense = torch.randn(3, 7)
    weight = quantize(block_type(name), dense)
    data = encode(block_type(name), weight)
    assert torch.equal(weight["weight"], dense.to(weight["weight"].dtype))
    expected = gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType[name])
    assert data.numpy().tobytes() == np.ascontiguousarray(expected).tobytes()


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(LLAMA_CPP)), data=st.data())
def test_any_finite_weights_become_finite_ones_of_the_same_size(name: str, data: st.DataObject) -> None:
    kind = block_type(name)
    number = st.floats(-60000, 60000, width=16)
    few = data.draw(st.lists(number, min_size=1, max_size=6))
    dense = torch.tensor(few)[torch.randint(len(few), (2, kind.block_size))]
    found = quantize(kind, dense).dequantize()
    assert found.isfinite().all()
    assert found.abs().max() <= 1.3 * dense.abs().max() + 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    dense = torch.zeros(2, 256)
    dense[1, 3] = value
    with pytest.raises(InputError, match=r"blk\.0 holds values that are not finite"):
        quantize(block_type("Q4_K"), dense, name="blk.0")


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_values_beyond_float16_scales_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"values up to 1e\\+12 are too large for {name}'s float16 scales"):
        quantize(block_type(name), torch.full((1, 256), -1e12))


def test_values_beyond_float16_are_refused_as_f16_but_fit_bf16() -> None:
    with pytest.raises(UsageError, match="values up to 70000 do not fit") as caught:
        quantize(block_type("F16"), torch.tensor([[70000.0, 1.0]]))
    assert "BF16" in str(caught.value.hint)
    assert quantize(block_type("BF16"), torch.tensor([[70000.0]])).dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("name", "columns", "importance", "message"),
    [
        ("Q4_K", 288, None, "w: Q4_K needs rows that are a multiple of 256, not 288"),
        ("Q4_0", 40, None, "w: Q4_0 needs rows that are a multiple of 32, not 40"),
        ("NVFP4", 64, None, "w: there is no encoder for NVFP4; there are F32, F16"),
        ("Q4_0", 64, torch.ones(32), r"w: the importance has shape \[32\], but must be \[64\]"),
        ("Q4_0", 64, -torch.ones(64), "must be finite and not negative"),
        ("Q4_0", 64, torch.full((64,), torch.inf), "must be finite and not negative"),
    ],
)
def test_wrong_parameters_are_named(name: str, columns: int, importance: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(block_type(name), torch.ones(1, columns), importance, name="w")
