"""Parts of a decoder from a checkpoint: what is missing or misshapen is named; schemes may be mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError
from aphroquant.models.loader import dense_linear, load_block, load_embedding, load_final_norm, load_head
from aphroquant.models.spec import LINEARS
from aphroquant.schemes import IntegerScheme, QuantizedWeight

TinyCheckpoint = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def edited(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny checkpoint whose tensors a function has changed in place."""

    def edit(change: Callable[[Tensors], object], family: str = "llama", **overrides: object) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint(family, **overrides), path)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return edit


@pytest.mark.parametrize(
    "name",
    [f"{Q_PROJ}.weight", "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"],
)
def test_a_missing_tensor_of_a_block_is_named(name: str, edited: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(edited(lambda tensors: tensors.pop(name)))
    load_block(checkpoint, 0)
    with pytest.raises(InputError, match=name):
        load_block(checkpoint, 1)


def test_a_missing_bias_or_qk_norm_is_named(edited: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(edited(lambda tensors: tensors.pop(f"{Q_PROJ}.bias"), family="qwen2"))
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.bias is missing"):
        load_block(checkpoint, 1)


@pytest.mark.parametrize("part", [load_embedding, load_head, load_final_norm])
def test_a_missing_part_outside_the_blocks_is_named(part: Callable[..., object], edited: Callable[..., Path]) -> None:
    name = {load_embedding: "model.embed_tokens", load_head: "lm_head", load_final_norm: "model.norm"}[part]
    checkpoint = open_checkpoint(edited(lambda tensors: tensors.pop(f"{name}.weight")))
    with pytest.raises(InputError, match=rf"{name}\.weight is missing"):
        part(checkpoint)


def test_a_shape_that_contradicts_the_config_is_named(edited: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(edited(lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(64, 48)})))
    with pytest.raises(InputError, match=rf"{Q_PROJ} has shape \[64, 48\], but config.json makes it \[64, 64\]"):
        load_block(checkpoint, 1)


def test_a_norm_of_the_wrong_length_is_named(edited: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(edited(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)})))
    with pytest.raises(InputError, match=r"model.norm.weight has shape \[63\], but config.json makes it \[64\]"):
        load_final_norm(checkpoint)


def test_a_bias_of_zeros_that_the_config_does_not_know_is_left_out(edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.zeros(64)}))
    assert load_block(open_checkpoint(path), 1).linears


def test_a_bias_that_the_config_does_not_know_is_refused(edited: Callable[..., Path]) -> None:
    path = edited(lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.ones(64)}))
    with pytest.raises(InputError, match=rf"{Q_PROJ}\.bias is not zero"):
        load_block(open_checkpoint(path), 1)


def test_a_tied_head_is_the_embedding(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama", tie_word_embeddings=True))
    assert torch.equal(load_head(checkpoint), load_embedding(checkpoint))


def test_a_stored_head_wins_over_a_tied_embedding(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    checkpoint = open_checkpoint(path)
    assert not torch.equal(load_head(checkpoint), load_embedding(checkpoint))


def test_the_caller_chooses_how_each_linear_computes(tiny_checkpoint: TinyCheckpoint) -> None:
    seen: list[tuple[str, tuple[int, int], bool]] = []

    def record(name: str, weight: QuantizedWeight, bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        seen.append((name, weight.shape, bias is not None))
        return dense_linear(name, weight, bias)

    load_block(open_checkpoint(tiny_checkpoint("qwen2")), 1, make_linear=record)
    assert [name for name, _, _ in seen] == [f"model.layers.1.{linear}" for linear in LINEARS]
    assert [bias for _, _, bias in seen] == [True, True, True, False, False, False, False]
    assert seen[1][1] == (32, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_block_computes_in_the_asked_dtype(dtype: torch.dtype, tiny_checkpoint: TinyCheckpoint) -> None:
    block = load_block(open_checkpoint(tiny_checkpoint("qwen2")), 0, dtype)
    assert block.mlp(torch.randn(3, 64, dtype=dtype)).dtype == dtype
    assert all(norm.dtype == dtype for norm in block.norms.values())


def test_dense_linear_multiplies_by_the_dequantized_weight() -> None:
    scheme = IntegerScheme(bits=4, group_size=8, symmetric=False)
    tensors = {
        "codes": torch.randint(0, 16, (5, 24), dtype=torch.uint8),
        "scales": torch.rand(5, 3),
        "zeros": torch.randint(0, 16, (5, 3), dtype=torch.uint8),
    }
    weight, bias, x = QuantizedWeight(scheme, tensors, (5, 24)), torch.randn(5), torch.randn(2, 24)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias
    torch.testing.assert_close(dense_linear("m", weight, bias)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_embedding_stored_as_the_head_is_found(edited: Callable[..., Path]) -> None:
    def rename(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    checkpoint = open_checkpoint(edited(rename, tie_word_embeddings=True))
    assert torch.equal(load_embedding(checkpoint), load_head(checkpoint))
