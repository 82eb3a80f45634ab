"""Capacity on GPUs, and what tensor parallelism does not divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aphroquant.errors import UsageError
from aphroquant.models.spec import DecoderSpec, decoder_spec
from aphroquant.planning.gpus import GPUS, find_gpu
from aphroquant.planning.serving import USED_SHARE, WORKSPACE_BYTES, capacity, undivided
from aphroquant.schemes import FloatScheme, IntegerScheme

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def spec() -> DecoderSpec:
    return decoder_spec(LLAMA_8B)


def modules(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    return {f"{spec.block_prefix(0)}.{name}": spec.linear_shape(name) for name in spec.linears(0)}


def test_the_cache_fills_what_the_weights_leave(spec: DecoderSpec) -> None:
    gpu, num_bytes = find_gpu("H100-80G"), 5_700_000_000
    found = capacity(spec, num_bytes, gpu, 1)
    bytes_a_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, size of a head, 16 bit: 128 KiB
    left = gpu.memory_bytes * USED_SHARE - num_bytes - WORKSPACE_BYTES
    assert found.kv_tokens["16 bit"] == int(left // bytes_a_token)
    assert found.kv_tokens["fp8"] == pytest.approx(2 * found.kv_tokens["16 bit"], abs=1)
    assert found.tokens_per_second == pytest.approx(3350e9 / num_bytes)


def test_ranks_share_weights_and_heads_but_repeat_a_head_that_they_cannot_share(spec: DecoderSpec) -> None:
    gpu = GPUS["a100-40g"]
    one, four = capacity(spec, 16 * 10**9, gpu, 1), capacity(spec, 16 * 10**9, gpu, 4)
    assert four.weight_bytes == 4 * 10**9
    assert four.kv_tokens["fp8"] > 4 * one.kv_tokens["fp8"]
    repeated = capacity(replace(spec, num_kv_heads=2), 16 * 10**9, gpu, 4)
    shared = capacity(replace(spec, num_kv_heads=4), 16 * 10**9, gpu, 4)
    assert repeated.kv_tokens == shared.kv_tokens  # one head a rank either way


def test_what_is_too_large_does_not_fit(spec: DecoderSpec) -> None:
    assert not capacity(spec, 16 * 10**9, GPUS["t4-16g"], 1).fits
    assert capacity(spec, 16 * 10**9, GPUS["t4-16g"], 2).fits


def test_a_model_that_divides_has_nothing_to_tell(spec: DecoderSpec) -> None:
    shapes = modules(spec)
    for ranks in (1, 2, 4, 8):
        assert undivided(spec, shapes, dict.fromkeys(shapes, IntegerScheme(4, 128, True)), ranks) == []


def test_groups_and_blocks_must_stay_whole(spec: DecoderSpec) -> None:
    shapes = modules(spec)
    told = undivided(spec, shapes, dict.fromkeys(shapes, IntegerScheme(4, 512, True)), 16)
    assert told == [
        "model.layers.0.self_attn.o_proj: a rank's 256 of 4096 inputs are no multiple of 512 (int4 sym g512)",
        "model.layers.0.mlp.down_proj: a rank's 896 of 14336 inputs are no multiple of 512 (int4 sym g512)",
    ]
    fp8 = FloatScheme("block", (128, 128))
    told = undivided(spec, shapes, dict.fromkeys(shapes, fp8), 16)
    assert any("a rank's 64 of 1024 outputs are no multiple of 128" in reason for reason in told)


def test_heads_must_divide(spec: DecoderSpec) -> None:
    shapes = modules(spec)
    told = undivided(spec, shapes, dict.fromkeys(shapes, IntegerScheme(4, 32, True)), 3)
    assert told[0] == "32 attention heads are no multiple of 3 ranks"
    assert told[1] == "8 heads of keys and values neither divide 3 ranks nor are divided by them"


def test_an_unknown_gpu_is_answered_with_a_near_one() -> None:
    with pytest.raises(UsageError, match="unknown GPU 'h100'") as caught:
        find_gpu("h100")
    assert "Did you mean 'h100-" in (caught.value.hint or "")
