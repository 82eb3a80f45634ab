"""Models with experts on a GPU, quantized: the answers are likeliest by the reference's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant import LLM, SamplingParams, convert
from aphroquant.checkpoint import open_checkpoint
from aphroquant.models.streamed import StreamedModel

TinyCheckpoint = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "head_dim": 32},
}
SCHEMES = ["w4a16", "w8a16", "fp8-dynamic"]


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_likeliest_by_the_reference(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str, scheme: str
) -> None:
    from aphroquant.engine.cuda.choice import gpu_obstacle

    if reason := gpu_obstacle():
        pytest.skip(reason)
    source = tiny_checkpoint(family, **FAMILIES[family])
    group: dict[str, Any] = {"group_size": 32} if scheme.startswith("w") else {}
    convert(source, out=tmp_path / "out", to="compressed-tensors", scheme=scheme, samples=0, **group)
    llm = LLM(str(tmp_path / "out"), device="cuda", num_kv_blocks=64, dtype="float16")
    prompts = [[5, 9, 77, 30], list(range(3, 43)), *([3 + i, 40 + i, 9] for i in range(6))]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    model, gaps = StreamedModel(open_checkpoint(str(tmp_path / "out"))), []
    for prompt, generation in zip(prompts, llm.generate(prompts, sampling), strict=True):
        tokens = generation.token_ids
        windows = torch.tensor([[*prompt, *tokens]])
        logits = model.logits(model.hidden_states(windows)[0])[len(prompt) - 1 : -1]
        gaps.append(logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0])
    # A token whose experts are chosen by a hair may get another one, and answers that follow it differ for good.
    assert float(torch.cat(gaps).quantile(0.9)) < 5e-2
