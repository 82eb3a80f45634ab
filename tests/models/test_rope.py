"""Rotary positions: rotation is a rotation, and frequencies are those of transformers to the last bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aphroquant.models.rope import cos_sin, inverse_frequencies, rotate
from aphroquant.models.spec import RopeSpec, decoder_spec

HEAD_DIM = 64
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, other betas": {
        "rope_type": "yarn", "factor": 16.0, "beta_fast": 64.0, "beta_slow": 2.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_equal_those_of_transformers(name: str, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**SCALINGS[name], "rope_theta": theta}
    config = LlamaConfig(
        head_dim=HEAD_DIM, num_attention_heads=4, hidden_size=256, rope_parameters=parameters,
        max_position_embeddings=131072,
    )  # fmt: skip
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    frequencies, factor = inverse_frequencies(decoder_spec(config.to_dict()).rope, HEAD_DIM)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    rope = RopeSpec(10000.0)
    q, k = torch.randn(2, 1, 1, HEAD_DIM, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        rotated_q = rotate(q, *cos_sin(rope, HEAD_DIM, torch.tensor([query_position])))
        rotated_k = rotate(k, *cos_sin(rope, HEAD_DIM, torch.tensor([key_position])))
        assert float(rotated_q.norm()) == pytest.approx(float(q.norm()), rel=1e-6)
        return float((rotated_q * rotated_k).sum())

    assert score(25, 20) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(25, 20) != pytest.approx(score(25, 15), rel=1e-4)


def test_position_zero_is_left_as_it_is() -> None:
    x = torch.randn(1, 3, HEAD_DIM)
    assert torch.equal(rotate(x, *cos_sin(RopeSpec(10000.0), HEAD_DIM, torch.zeros(1, dtype=torch.int64))), x)
