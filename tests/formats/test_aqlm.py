"""AQLM files, judged by the aqlm package and by scalar loops over the stored tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.aqlm import Aqlm
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import AdditiveScheme, IntegerScheme, QuantizedWeight, Scheme

MODULE = "model.layers.0.mlp.down_proj"
LAYOUTS = [
    AdditiveScheme(1, 16),
    AdditiveScheme(2, 8),
    AdditiveScheme(1, 16, in_group=16),
    AdditiveScheme(1, 15),
    AdditiveScheme(3, 9, out_group=2, in_group=4),
    AdditiveScheme(1, 1, out_group=4, in_group=1),
    AdditiveScheme(2, 17, in_group=1),
]


def config_of(layout: AdditiveScheme, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "aqlm",
        "nbits_per_codebook": layout.code_bits,
        "num_codebooks": layout.num_codebooks,
        "out_group_size": layout.out_group,
        "in_group_size": layout.in_group,
        "linear_weights_not_to_quantize": ["lm_head.weight"],
    } | changes


def stored_tensors(layout: AdditiveScheme, n: int = 8, k: int = 32) -> dict[str, Tensor]:
    """A layer as the field stores it, with the outermost codes in it."""
    dtype = torch.int8 if layout.code_bits <= 8 else torch.int16 if layout.code_bits <= 16 else torch.int32
    half = 2 ** (layout.code_bits - 1)
    shape = (n // layout.out_group, k // layout.in_group, layout.num_codebooks)
    codes = torch.randint(-half, half, shape)
    codes.view(-1)[:2] = torch.tensor([-half, half - 1])
    books = (layout.num_codebooks, 2 * half, layout.out_group, layout.in_group)
    return {
        "codes": codes.to(dtype),
        "codebooks": torch.randn(books).half(),
        "scales": torch.rand(n // layout.out_group, 1, 1, 1).half(),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_stored_layers_follow_the_formula_and_are_written_byte_for_byte(
    layout: AdditiveScheme, reread: Callable[[Format], Format]
) -> None:
    tensors = stored_tensors(layout)
    weight = Aqlm.from_config(config_of(layout)).read(MODULE, tensors)
    weight.check(MODULE)
    assert weight.scheme == layout
    assert weight.shape == (8, 32)
    dequantized = weight.dequantize(torch.float64)
    for row in range(8):
        for column in range(32):
            i, a = divmod(row, layout.out_group)
            j, c = divmod(column, layout.in_group)
            total = 0.0
            for m in range(layout.num_codebooks):
                index = int(tensors["codes"][i, j, m]) % 2**layout.code_bits
                total += float(tensors["codebooks"][m, index, a, c])
            assert float(dequantized[row, column]) == pytest.approx(total * float(tensors["scales"][i]), rel=1e-13)

    written = Aqlm.for_schemes({MODULE: layout}, [])
    again = written.write(MODULE, weight)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor), name
    assert torch.equal(reread(written).read(MODULE, again).dequantize(), weight.dequantize())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_aqlm_package_makes_the_same_weight_of_it(layout: AdditiveScheme) -> None:
    utils = pytest.importorskip("aqlm.utils", reason="the aqlm package is the judge")
    tensors = stored_tensors(layout)
    codes = utils.unpack_int_data(tensors["codes"], layout.code_bits)
    theirs = utils._dequantize_weight(codes, tensors["codebooks"].float(), tensors["scales"].float())
    ours = Aqlm.from_config(config_of(layout)).read(MODULE, tensors).dequantize()
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same_logits_from_what_is_written(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Not 8-bit codebooks: on a CPU the aqlm package has numba kernels for these."""
    pytest.importorskip("aqlm", reason="transformers loads AQLM with the aqlm package")
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(tiny_checkpoint("llama"))
    layout = AdditiveScheme(1, 12)
    modules = [module for module in source.schemes() if "proj" in module]
    format = Aqlm.for_schemes(dict.fromkeys(modules, layout), ["model.embed_tokens"])
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with CheckpointWriter(tmp_path / "ours") as writer:
        for name in source.tensors:
            if name.removesuffix(".weight") not in modules:
                writer.add(name, source.read(name))
        for module in modules:
            weight = format.read(module, stored_tensors(layout, *source.info(f"{module}.weight").shape))
            reference.get_submodule(module).weight.data = weight.dequantize()
            for suffix, tensor in format.write(module, weight).items():
                writer.add(f"{module}.{suffix}", tensor)
        writer.finish(source.config | {"quantization_config": format.quantization_config()})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_unsigned_codes_of_a_wider_type_are_taken_too() -> None:
    layout = AdditiveScheme(1, 9, in_group=4)
    tensors = stored_tensors(layout)
    unsigned = {**tensors, "codes": tensors["codes"] % 512}
    format = Aqlm.from_config(config_of(layout))
    assert torch.equal(format.read(MODULE, unsigned).dequantize(), format.read(MODULE, tensors).dequantize())


def test_dense_modules_are_listed_under_both_names_that_readers_look_for() -> None:
    config = Aqlm.for_schemes({MODULE: LAYOUTS[0]}, ["model.embed_tokens"]).quantization_config()
    expected = ["model.embed_tokens.weight", "model.embed_tokens", "lm_head.weight", "lm_head"]
    assert config["linear_weights_not_to_quantize"] == expected


def test_a_module_without_codes_is_dense() -> None:
    headers = {"weight": TensorHeader(torch.float16, (4, 4))}
    assert Aqlm.from_config(config_of(LAYOUTS[0])).scheme("lm_head", headers) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"nbits_per_codebook": 0},
        {"nbits_per_codebook": 64},
        {"nbits_per_codebook": "16"},
        {"num_codebooks": -1},
        {"in_group_size": 0},
        {"linear_weights_not_to_quantize": "lm_head"},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        Aqlm.from_config(config_of(LAYOUTS[0], **changes))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("codes", lambda t: t[..., 0], r"codes has shape \[8, 4\]"),
        ("codes", lambda t: t[..., :1], r"codes has shape \[8, 4, 1\]"),
        ("codes", lambda t: t[:0], r"codes has shape \[0, 4, 2\]"),
        ("codes", lambda t: t.short(), "codes has dtype int16"),
        ("codebooks", lambda t: t[:1], r"codebooks has shape \[1, 256, 1, 8\]"),
        ("codebooks", lambda t: t[:, :255], r"codebooks has shape \[2, 255, 1, 8\]"),
        ("codebooks", lambda t: t.int(), "codebooks has dtype int32"),
        ("scales", lambda t: t[:, 0], r"scales has shape \[8, 1, 1\]"),
        ("scales", lambda t: t[1:], r"scales has shape \[7, 1, 1, 1\]"),
    ],
)
def test_malformed_tensors_are_told_by_name(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = stored_tensors(AdditiveScheme(2, 8))
    with pytest.raises(InputError, match=message) as raised:
        Aqlm.from_config(config_of(AdditiveScheme(2, 8))).read(MODULE, {**tensors, name: change(tensors[name])})
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("name", ["codes", "codebooks", "scales"])
def test_missing_tensors_are_told_by_name(name: str) -> None:
    tensors = stored_tensors(AdditiveScheme(2, 8))
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        Aqlm.from_config(config_of(AdditiveScheme(2, 8))).scheme(MODULE, headers_of(tensors))


@pytest.mark.parametrize("code", [-17000, 32767])
def test_codes_out_of_range_are_refused(code: int) -> None:
    layout = AdditiveScheme(1, 14)
    tensors = stored_tensors(layout)
    tensors["codes"][1, 2, 0] = code
    with pytest.raises(InputError, match=f"codes has the value {code}, which is no code of 14 bits"):
        Aqlm.from_config(config_of(layout)).read(MODULE, tensors)


@pytest.mark.parametrize("scheme", [IntegerScheme(4, 64, symmetric=True), AdditiveScheme(2, 8)], ids=str)
def test_other_schemes_and_several_ones_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match=r"model\.layers\.1"):
        Aqlm.for_schemes({MODULE: AdditiveScheme(1, 16), "model.layers.1.mlp.up_proj": scheme}, [])


def test_codes_beyond_the_codebook_are_not_written() -> None:
    layout = AdditiveScheme(1, 9)
    weight = Aqlm.from_config(config_of(layout)).read(MODULE, stored_tensors(layout))
    broken = QuantizedWeight(layout, {**weight.tensors, "codes": torch.full_like(weight["codes"], 512)}, weight.shape)
    with pytest.raises(UsageError, match="codes has the value 512, the limit is 511"):
        Aqlm.for_schemes({MODULE: layout}, []).write(MODULE, broken)
