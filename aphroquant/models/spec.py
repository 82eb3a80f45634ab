"""Decoder families as data: one `DecoderSpec` read from config.json tells the forward everything it needs.

Adding a family that fits the shape (pre-norm attention with rotary positions, gated MLP or experts that are gated MLPs)
is one entry in FAMILIES.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aphroquant.errors import InputError

Q, K, V, O = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"  # noqa: E741
GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
MAX_INTEGER = 2**31 - 1  # of any size in a config: their products stay within 64 bits
LINEARS = (Q, K, V, O, GATE, UP, DOWN)  # in the order of execution
INPUT_NORM, POST_ATTENTION_NORM = "input_layernorm", "post_attention_layernorm"
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens", "model.norm", "lm_head"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions: base and, if any, the scaling ("default", "linear", "llama3", "yarn") with its parameters."""

    theta: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts that stand in place of the MLP: each a gated MLP, of which a router chooses `top_k` for a token.

    `router` and `prefix` are names within a block; an expert's layers are PREFIX.NUMBER.NAME, with the names of
    `linears`: gate, up, down.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    router: str
    prefix: str
    linears: tuple[str, str, str]
    normalizes: bool  # the weights of a token's experts are scaled to add up to 1
    layers: tuple[bool, ...]  # whether each layer has experts; else it has an MLP

    def __post_init__(self) -> None:
        if self.top_k > self.num_experts:
            raise InputError(
                f"config.json: num_experts_per_tok = {self.top_k} is more than the {self.num_experts} experts"
            )

    def expert(self, number: int) -> tuple[str, str, str]:
        """The names of an expert's layers in a block: gate, up, down."""
        gate, up, down = (f"{self.prefix}.{number}.{name}" for name in self.linears)
        return gate, up, down


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer of the Llama shape. Sizes in elements; `sliding_windows` one entry a layer."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    experts: ExpertsSpec | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config.json: num_attention_heads = {self.num_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"config.json: head_dim = {self.head_dim} must be even: rotary positions pair channels")

    def block_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}"

    def has_experts(self, layer: int) -> bool:
        """Whether the block has experts in place of an MLP."""
        return self.experts is not None and self.experts.layers[layer]

    def linears(self, layer: int) -> tuple[str, ...]:
        """The names of a block's linears, in the order of execution. A router is none of them."""
        if self.experts is None or not self.experts.layers[layer]:
            return LINEARS
        experts = (name for number in range(self.experts.num_experts) for name in self.experts.expert(number))
        return (Q, K, V, O, *experts)

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) of one of a block's linears."""
        if self.experts is not None and linear.startswith(f"{self.experts.prefix}."):
            is_down = linear.rpartition(".")[2] == self.experts.linears[2]
            inner = self.experts.intermediate_size
            return (self.hidden_size, inner) if is_down else (inner, self.hidden_size)
        attention, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            Q: (attention, self.hidden_size),
            K: (kv, self.hidden_size),
            V: (kv, self.hidden_size),
            O: (self.hidden_size, attention),
            GATE: (self.intermediate_size, self.hidden_size),
            UP: (self.intermediate_size, self.hidden_size),
            DOWN: (self.hidden_size, self.intermediate_size),
        }[linear]

    def has_bias(self, linear: str) -> bool:
        if linear in (Q, K, V):
            return self.qkv_bias
        return self.o_bias if linear == O else self.mlp_bias and linear in LINEARS

    def modules(self) -> list[str]:
        """Names of all block linears, in the order of execution: model.layers.0.self_attn.q_proj, ..."""
        return [f"{self.block_prefix(i)}.{linear}" for i in range(self.num_layers) for linear in self.linears(i)]


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a Hugging Face config.json. Raises InputError for an unknown family or a missing or odd key."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"config.json: model_type {family!r} is not supported; known are {', '.join(sorted(FAMILIES))}",
        )
    config = {**_ABSENT_KEYS[family], **config}
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; only silu is")
    num_heads = _integer(config, "num_attention_heads")
    hidden_size = _integer(config, "hidden_size")
    num_layers = _integer(config, "num_hidden_layers")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise InputError(f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return DecoderSpec(
        family=family,
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
        head_dim=_integer(config, "head_dim", hidden_size // num_heads),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=_integer(config, "max_position_embeddings"),
        rope=_rope(config),
        sliding_windows=_sliding_windows(config, num_layers),
        **FAMILIES[family](config),
    )


def _llama(config: Mapping[str, Any]) -> dict[str, bool]:
    attention_bias = bool(config.get("attention_bias", False))
    return {
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "qk_norm": False,
    }


def _qwen2(config: Mapping[str, Any]) -> dict[str, bool]:
    return {**_llama(config), "qkv_bias": True, "o_bias": False, "mlp_bias": False}


def _mistral(config: Mapping[str, Any]) -> dict[str, bool]:
    return {**_llama(config), "qkv_bias": False, "o_bias": False, "mlp_bias": False}


def _qwen3(config: Mapping[str, Any]) -> dict[str, bool]:
    return {**_llama(config), "qk_norm": True, "mlp_bias": False}


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = ExpertsSpec(
        num_experts=_integer(config, "num_local_experts"),
        top_k=_integer(config, "num_experts_per_tok"),
        intermediate_size=_integer(config, "intermediate_size"),
        router="block_sparse_moe.gate",
        prefix="block_sparse_moe.experts",
        linears=("w1", "w3", "w2"),
        normalizes=True,
        layers=(True,) * _integer(config, "num_hidden_layers"),
    )
    return {**_mistral(config), "experts": experts}


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    step, num_layers = _integer(config, "decoder_sparse_step"), _integer(config, "num_hidden_layers")
    dense = config["mlp_only_layers"] or []
    if not isinstance(dense, list):
        raise InputError(f"config.json: mlp_only_layers = {dense!r} must be a list")
    experts = ExpertsSpec(
        num_experts=_integer(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=_integer(config, "num_experts_per_tok"),
        intermediate_size=_integer(config, "moe_intermediate_size"),
        router="mlp.gate",
        prefix="mlp.experts",
        linears=("gate_proj", "up_proj", "down_proj"),
        normalizes=bool(config["norm_topk_prob"]),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
    )
    return {**_qwen3(config), "experts": experts}


# SmolLM and SmolLM2 are published as model_type llama.
FAMILIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}

# What a key means that a config.json leaves out (an explicit null means something else): the families' own defaults.
_ABSENT_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_INTEGER:
        raise InputError(f"config.json: {key} = {value!r} must be a positive integer, at most {MAX_INTEGER}")
    return value


def _number(mapping: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = mapping.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"config.json: {key} is missing")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"config.json: {key} = {value!r} must be a positive number")
    return float(value)


# The numbers that each kind of rope scaling cannot do without.
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config.json: rope_parameters = {found!r} must be an object")
    parameters = dict(found)
    if nested := next((key for key, value in parameters.items() if isinstance(value, Mapping)), None):
        raise InputError(f"config.json: rope parameters of their own for {nested!r} layers are not supported")
    theta = _number({**config, **{k: v for k, v in parameters.items() if v is not None}}, "rope_theta", 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        raise InputError(f"config.json: rope scaling {kind!r} is not supported; known are {', '.join(_ROPE_NUMBERS)}")
    rotary_share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotary_share not in (None, 1, 1.0):
        raise InputError(f"config.json: partial_rotary_factor = {rotary_share!r} is not supported; only 1 is")
    for key in ("rope_theta", "rope_type", "type", "partial_rotary_factor"):
        parameters.pop(key, None)
    if kind == "default" and parameters.get("factor") not in (None, 1, 1.0):
        raise InputError(f"config.json: rope parameters with a factor, {found!r}, name no rope_type")
    if "original_max_position_embeddings" in _ROPE_NUMBERS[kind]:
        _complete_original_length(parameters, config)
    for key in _ROPE_NUMBERS[kind]:
        parameters[key] = _number(parameters, key)
    _check_rope(theta, parameters)
    return RopeSpec(theta, kind, parameters)


def _check_rope(theta: float, parameters: Mapping[str, Any]) -> None:
    """Refuse numbers with which positions would turn the wrong way."""
    for key, value in {"rope_theta": theta, **parameters}.items():
        if key in ("rope_theta", "factor") and value is not None and value < 1:
            raise InputError(f"config.json: {key} = {value!r} must be at least 1")
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if low is not None and high is not None and not low < high:
        raise InputError(f"config.json: low_freq_factor = {low!r} must be below high_freq_factor = {high!r}")


def _complete_original_length(parameters: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Fill in what may be left out: the length before scaling, and from it YaRN's factor."""
    longest = _integer(config, "max_position_embeddings")
    longest_before = float(longest)
    for place in (parameters, config):
        if place.get("original_max_position_embeddings") is not None:
            longest_before = _number(place, "original_max_position_embeddings")
    parameters["original_max_position_embeddings"] = longest_before
    if parameters.get("factor") is None:
        parameters["factor"] = longest / _number(parameters, "original_max_position_embeddings")


def _sliding_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    family = config["model_type"]
    is_qwen = family in ("qwen2", "qwen3", "qwen3_moe")
    layer_types = _layer_types(config, num_layers)
    if family == "llama" or config.get("sliding_window") is None:
        return (None,) * num_layers
    if is_qwen and not config.get("use_sliding_window", False):
        return (None,) * num_layers
    window = _integer(config, "sliding_window")
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = config["max_window_layers"] if is_qwen and family != "qwen3_moe" else 0
    if not isinstance(first, int):
        raise InputError(f"config.json: max_window_layers = {first!r} must be an integer")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _layer_types(config: Mapping[str, Any], num_layers: int) -> list[str] | None:
    layer_types = config.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list):
        raise InputError(f"config.json: layer_types = {layer_types!r} must be a list")
    if len(layer_types) != num_layers:
        raise InputError(f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers")
    for kind in layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"config.json: layer type {kind!r} is not supported")
    return list(layer_types)
