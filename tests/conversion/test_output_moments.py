"""Second moments of gradients by layers' outputs: against automatic differentiation of the whole model in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.conversion import output_moments as module
from aphroquant.conversion.output_moments import OutputMoments, output_moments

Tiny = Callable[..., Path]
CPU = torch.device("cpu")


def windows(count: int = 3) -> Tensor:
    return torch.randint(0, 360, (count, 24), generator=torch.Generator().manual_seed(0))


def gathered(checkpoint: Checkpoint, ids: Tensor) -> OutputMoments:
    return output_moments(checkpoint, ids, checkpoint.spec.modules(), seed=5, device=CPU)


def reference(path: Path, ids: Tensor) -> dict[str, Tensor]:
    """By transformers, with the same draws from what it predicts."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    gradients: dict[str, Tensor] = {}

    def observe(name: str, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradients.__setitem__(name, gradient.flatten(0, 1)))

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_hook(lambda _, __, output, name=name: observe(name, output))
    logs = model(ids).logits.flatten(0, 1).log_softmax(-1)
    draw = torch.rand(logs.shape[0], 1, generator=torch.Generator().manual_seed(5)).double()
    drawn = torch.searchsorted(logs.detach().exp().cumsum(-1), draw)
    (-logs.gather(1, drawn).sum()).backward()
    return {name: gradient.T @ gradient / len(gradient) for name, gradient in gradients.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_they_are_those_of_the_whole_models_gradients(family: str, tiny_checkpoint: Tiny) -> None:
    path = tiny_checkpoint(family)
    found, expected = gathered(open_checkpoint(path), windows()), reference(path, windows())
    assert len(expected) == 14
    for name, moment in expected.items():
        own = found.of(name)
        assert own is not None
        assert float((own - moment).norm() / moment.norm()) < 1e-3, name


def test_temporary_files_and_chunks_change_nothing(tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, name = open_checkpoint(tiny_checkpoint("llama")), "model.layers.0.mlp.up_proj"
    whole = gathered(checkpoint, windows()).of(name)
    monkeypatch.setattr(module, "default_memory_limit", lambda stores: 0)
    monkeypatch.setattr("aphroquant.conversion.activations.CHUNK_TOKENS", 24)
    parts = gathered(checkpoint, windows()).of(name)
    assert whole is not None
    assert parts is not None
    assert torch.allclose(whole, parts, rtol=1e-3, atol=1e-6 * float(whole.abs().max()))


def test_layers_that_are_too_wide_or_not_asked_for_are_left_out(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    monkeypatch.setattr(module, "MAX_OUTPUTS", 100)
    asked = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    found = output_moments(checkpoint, windows(1), asked, seed=0, device=CPU)
    assert found.of("model.layers.1.mlp.up_proj") is None  # 128 outputs
    assert found.of("model.layers.1.mlp.down_proj") is not None
    assert found.of("model.layers.0.mlp.down_proj") is None
