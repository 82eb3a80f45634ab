"""config.json -> DecoderSpec: the same reading as transformers', old files and new, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest

from aphroquant.errors import InputError
from aphroquant.models.spec import DOWN, LINEARS, K, O, Q, decoder_spec

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(family: str = "llama", **keys: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **keys}


OLD_STYLE: dict[str, dict[str, Any]] = {
    "llama 2": config(rope_scaling=None, max_position_embeddings=4096),
    "llama 3": config(rope_theta=500000.0, rope_scaling=None),
    "llama 3.1": config(
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "linear named type": config(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2.0}),
    "yarn": config(
        "qwen2",
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    ),
    "yarn without the original length": config(
        "qwen3", head_dim=16, rope_theta=1e6, max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 2.0}
    ),
    "mistral 0.1": config("mistral", rope_theta=10000.0, sliding_window=4096),
    "mistral 0.3": config("mistral", rope_theta=1000000.0, sliding_window=None),
    "mistral, no key": config("mistral"),
    "qwen2 unused window": config("qwen2", sliding_window=128, use_sliding_window=False, max_window_layers=1),
    "qwen2 window": config("qwen2", sliding_window=128, use_sliding_window=True, max_window_layers=1),
    "qwen2 window, no layer count": config("qwen2", sliding_window=128, use_sliding_window=True),
    "qwen3 without head_dim": config("qwen3", rope_theta=1000000.0),
    "llama with a stray window": config(sliding_window=128),
    "integer theta": config(rope_theta=10000),
    "tied": config(tie_word_embeddings=True),
    "biases": config(attention_bias=True, mlp_bias=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_STYLE)
def test_a_file_reads_as_transformers_reads_it(name: str) -> None:
    from transformers import AutoConfig

    stored = OLD_STYLE[name]
    completed = AutoConfig.for_model(**stored).to_dict()
    assert decoder_spec(stored) == decoder_spec(completed)


def test_mistral_with_layer_types_slides_only_where_they_say() -> None:
    spec = decoder_spec(
        config("mistral", sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention"])
    )
    assert spec.sliding_windows == (None, 8, None)


def test_shapes_and_biases_follow_the_family() -> None:
    spec = decoder_spec(config("qwen3", head_dim=32, attention_bias=True))
    assert spec.linear_shape(Q) == (128, 64)
    assert spec.linear_shape(K) == (64, 64)
    assert spec.linear_shape(O) == (64, 128)
    assert spec.linear_shape(DOWN) == (64, 96)
    assert spec.has_bias(Q)
    assert spec.has_bias(O)
    assert not spec.has_bias(DOWN)
    assert spec.qk_norm
    qwen2 = decoder_spec(config("qwen2"))
    assert [linear for linear in LINEARS if qwen2.has_bias(linear)] == list(LINEARS[:3])


def test_modules_come_in_the_order_of_execution() -> None:
    modules = decoder_spec(config()).modules()
    assert len(modules) == 3 * 7
    assert modules[0] == "model.layers.0.self_attn.q_proj"
    assert modules[-1] == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size = '64' must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be a positive integer"),
        ({"hidden_size": 65}, "hidden_size 65 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 15}, "head_dim = 15 must be even"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny' must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 must be a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0 must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for 'full_attention' layers"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": ["full_attention"] * 2 + ["linear_attention"]}, "'linear_attention' is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window = 0 must be a positive integer"),
    ],
)  # fmt: skip
def test_an_odd_config_is_refused_naming_the_key(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        decoder_spec(config() | broken)
