"""A tensor that a format knows nothing of, inside a layer that it has quantized, is never left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Mapping[str, dict[str, bytes]]:
    """Sound checkpoints of every format with safetensors: name -> files."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from fuzzing.corpus import QUANTIZED, checkpoint_files

    return {name: checkpoint_files(name) for name in QUANTIZED}


def test_a_tensor_that_the_format_does_not_know_is_named(
    corpus: Mapping[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for name, files in corpus.items():
        place = tmp_path / name
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        assert open_checkpoint(place).schemes(), name
        tensors = load_file(place / "model.safetensors")
        for extra in ("qweight_2", "lora_A", "pre_scale"):
            save_file({**tensors, f"{MODULE}.{extra}": torch.ones(4, 4)}, place / "model.safetensors")
            with pytest.raises(InputError, match=rf"up_proj\.{extra} is no part of a layer that") as caught:
                open_checkpoint(place).schemes()
            assert caught.value.hint, name


def test_biases_and_scales_of_the_cache_are_no_part_of_a_quantized_weight(
    corpus: Mapping[str, dict[str, bytes]], tmp_path: Path
) -> None:
    for file, content in corpus["gptq"].items():
        (tmp_path / file).write_bytes(content)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {f"{MODULE}.bias": torch.ones(4), "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert set(extra) <= set(open_checkpoint(tmp_path).dense_names())
