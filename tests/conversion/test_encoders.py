"""Four-bit floats, tables and eight-bit integers from a model to a file, decoded by the formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult, convert
from aphroquant.errors import UsageError
from aphroquant.inspection.verify import verify
from aphroquant.numbers import same_bytes
from aphroquant.schemes import IntegerScheme, LookupScheme

Tiny = Callable[..., Path]
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def converted(source: Path, out: Path, to: str, scheme: str | None, **options: Any) -> ConversionResult:
    options = {"samples": 4, "seq_len": 32} | options
    return convert(source, to=to, out=out, scheme=scheme, **options)


def stored(folder: Path, module: str) -> dict[str, Tensor]:
    """A module's tensors by suffix."""
    tensors = load_file(folder / "model.safetensors")
    return {
        name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")
    }


def by_compressed_tensors(folder: Path, module: str) -> Tensor:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    tensors = stored(folder, module)
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    weight: Tensor = compressor.decompress(tensors, scheme)["weight"]
    return weight


def by_bitsandbytes(folder: Path, module: str) -> Tensor:
    functional = pytest.importorskip("bitsandbytes.functional")
    tensors = stored(folder, module)  # its CPU kernel (0.50) is wrong, on its own weights too, if blocks cross rows
    state = functional.QuantState.from_dict(
        {name: tensor for name, tensor in tensors.items() if name != "weight"}, device=torch.device("cpu")
    )
    weight: Tensor = functional.dequantize_4bit(tensors["weight"], state)
    return weight


@pytest.mark.parametrize(
    ("scheme", "solver"),
    [
        ("nvfp4", "awq-gptq"),
        ("nvfp4a16", "rtn"),
        ("mxfp4", "gptq"),
        ("mxfp4a16", "mse"),
        ("w8a8-int8", "smoothquant"),
        ("w8a8-int8-static", "rtn"),
    ],
)
def test_compressed_tensors_decodes_what_the_solver_made(
    tiny_checkpoint: Tiny, tmp_path: Path, scheme: str, solver: str
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    result = converted(source, out, "compressed-tensors", scheme, solver=solver)
    checkpoint = open_checkpoint(out)
    for module in (Q, DOWN):
        ours = checkpoint.weight(module).dequantize()
        theirs = by_compressed_tensors(out, module)
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=0)
    assert result.num_bytes == sum(t.nbytes for t in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize(("scheme", "samples"), [("nf4", 4), ("nf4-dq", 4), ("nf4-dq", 0), ("fp4", 0)])
def test_bitsandbytes_decodes_what_the_solver_made(
    tiny_checkpoint: Tiny, tmp_path: Path, scheme: str, samples: int
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    converted(source, out, "bitsandbytes", scheme, samples=samples, group_size=32)
    checkpoint = open_checkpoint(out)
    for module in (Q, DOWN):
        assert torch.equal(checkpoint.weight(module).dequantize(), by_bitsandbytes(out, module))
    assert all(finding.severity == "info" for finding in verify(checkpoint).findings)


@pytest.mark.parametrize("scheme", ["nf4", "fp4-dq"])
def test_without_data_bitsandbytes_codes_are_the_library_s_own(
    tiny_checkpoint: Tiny, tmp_path: Path, scheme: str
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    converted(source, out, "bitsandbytes", scheme, samples=0)
    for module in (Q, DOWN):
        dense = stored(source, module)["weight"]
        packed, _ = functional.quantize_4bit(dense, blocksize=64, quant_type=scheme[:3])
        assert torch.equal(stored(out, module)["weight"], packed)


@pytest.mark.parametrize("samples", [0, 4])
def test_layers_that_engines_join_have_one_global_scale(tiny_checkpoint: Tiny, tmp_path: Path, samples: int) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    converted(source, out, "compressed-tensors", "nvfp4a16", samples=samples, solver="rtn")
    for modules in ((Q, K, V), (GATE, UP)):
        scales = [stored(out, module)["weight_global_scale"] for module in modules]
        assert all(torch.equal(scale, scales[0]) for scale in scales)


def test_pieces_of_a_layer_give_what_the_whole_gives(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, found = (
        tiny_checkpoint("llama", hidden_size=96, intermediate_size=160),
        dict[str, list[dict[str, Tensor]]](),
    )
    for pieces in (2**22, 800):
        monkeypatch.setattr("aphroquant.conversion.dataless.PIECE_ELEMENTS", pieces)
        for to, scheme in (("bitsandbytes", "nf4-dq"), ("modelopt", "nvfp4a16"), ("compressed-tensors", "mxfp4a16")):
            out = tmp_path / f"{scheme}-{pieces}"
            converted(source, out, to, scheme, samples=0)
            found.setdefault(scheme, []).append(load_file(out / "model.safetensors"))
    for whole, cut in found.values():
        assert whole.keys() == cut.keys()
        assert all(same_bytes(whole[name], cut[name]) for name in whole)


def test_nvfp4_for_modelopt_is_that_of_compressed_tensors(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A searched global scale is a power of two, exact as a factor and as a divisor."""
    weights = []
    for to in ("modelopt", "compressed-tensors"):
        converted(tiny_checkpoint("llama"), tmp_path / to, to, "nvfp4", solver="gptq")
        weights.append(open_checkpoint(tmp_path / to).weight(DOWN))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in ("scales", "global_scale", "input_scale"))
    assert torch.equal(weights[0].dequantize(), weights[1].dequantize())


def test_mxfp4_with_error_feedback_reaches_gguf_without_a_change(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    solved, packed = tmp_path / "solved", tmp_path / "model.gguf"
    converted(tiny_checkpoint("llama"), solved, "compressed-tensors", "mxfp4a16", solver="gptq")
    result = convert(solved, to="gguf", out=packed)
    assert result.mode == "repack"
    ours, theirs = (open_checkpoint(path).weight(DOWN).dequantize() for path in (solved, packed))
    assert torch.equal(ours, theirs)


def relative_errors(source: Path, out: Path, to: str, scheme: str | None, solvers: Mapping[str, int]) -> list[float]:
    found = []
    for solver, samples in solvers.items():
        result = converted(source, out, to, scheme, solver=solver, samples=samples, overwrite=True)
        assert result.mean_relative_error is not None
        found.append(result.mean_relative_error)
    return found


@pytest.mark.parametrize(("to", "scheme"), [("bitsandbytes", "nf4"), ("modelopt", "nvfp4")])
def test_search_and_error_feedback_lower_the_error_step_by_step(
    tiny_checkpoint: Tiny, tmp_path: Path, to: str, scheme: str
) -> None:
    errors = relative_errors(tiny_checkpoint("llama"), tmp_path / "out", to, scheme, {"mse": 4, "rtn": 4, "gptq": 4})
    assert errors[1] <= errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_hqq_writes_real_zero_points(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    errors = relative_errors(source, out, "hqq", None, {"rtn": 0, "hqq": 0})
    assert errors[1] < 1.5 * errors[0]
    assert str(open_checkpoint(out).weight(DOWN).scheme) == "int4 real zeros g64"


def test_smoothquant_folds_scales_into_norms_and_the_rows_in_front(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    result = converted(source, out, "compressed-tensors", "w8a8-int8-static")
    assert result.solver == "smoothquant"
    assert set(result.scaling["model.layers.0"]) == {"qkv", "o", "gate_up", "down"}
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(load_file(out / "model.safetensors")[name], load_file(source / "model.safetensors")[name])
    weight = open_checkpoint(out).weight(DOWN)
    assert isinstance(weight.scheme, IntegerScheme)
    assert float(weight["input_scale"]) > 0


def test_rules_give_modules_tables_of_their_own(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(tiny_checkpoint("llama"), out, "compressed-tensors", "nvfp4a16", rules=["down: scheme=mxfp4a16"])
    checkpoint = open_checkpoint(out)
    schemes = [checkpoint.weight(module).scheme for module in (UP, DOWN)]
    assert schemes == [LookupScheme("e2m1", 16, "e4m3"), LookupScheme("e2m1", 32, "e8m0")]


def test_a_head_of_four_bit_floats_has_one_global_scale(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(tiny_checkpoint("llama"), out, "compressed-tensors", "nvfp4a16", rules=["lm_head: scheme=nvfp4a16"])
    head = open_checkpoint(out).weight("lm_head")
    dense = load_file(tiny_checkpoint("llama") / "model.safetensors")["lm_head.weight"]
    assert float((head.dequantize() - dense).square().sum() / dense.square().sum()) < 0.02


@pytest.mark.parametrize("scheme", ["nvfp4", "w8a8-int8-static"])
def test_inputs_with_a_stored_scale_need_data(tiny_checkpoint: Tiny, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match="need calibration, but samples = 0"):
        converted(tiny_checkpoint("llama"), tmp_path / "out", "compressed-tensors", scheme, samples=0)
