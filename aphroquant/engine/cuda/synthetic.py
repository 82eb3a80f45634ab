"""Models of well-known shapes with random weights, made on the GPU: speed depends on shapes, not on values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from aphroquant.engine.cuda.choice import GpuChoice, gpu_choice, gpu_obstacle
from aphroquant.engine.cuda.experts import Experts
from aphroquant.engine.cuda.linears import Head, Prepare
from aphroquant.engine.cuda.loading import BATCHED_TOKENS, grouped_preparer, linear_preparer, place
from aphroquant.engine.cuda.weights import DecoderWeights, LayerWeights, MlpWeights
from aphroquant.engine.engine import Engine
from aphroquant.engine.loading import LoadedModel
from aphroquant.engine.runner import RunnerChoice
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import UsageError
from aphroquant.kernels.dispatch import PreparedGroupedLinear
from aphroquant.kernels.random_weights import random_weight
from aphroquant.models.spec import DOWN, GATE, DecoderSpec, ExpertsSpec, K, O, Q, V, decoder_spec
from aphroquant.schemes import DenseScheme, IntegerScheme, QuantizedWeight, Scheme


def _config(
    family: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    *,
    head_dim: int = 128,
    tied: bool = False,
    theta: float = 500000.0,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "rope_theta": theta,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "sliding_window": None,
    }


SYNTHETIC_MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _config("llama", 4096, 32, 32, 8, 14336, 128256),
    "llama-3-70b": _config("llama", 8192, 80, 64, 8, 28672, 128256),
    "llama-3.2-1b": _config("llama", 2048, 16, 32, 8, 8192, 128256, head_dim=64, tied=True),
    "mistral-7b": _config("mistral", 4096, 32, 32, 8, 14336, 32768),
    "qwen2.5-7b": _config("qwen2", 3584, 28, 28, 4, 18944, 152064, theta=1e6),
    "qwen3-8b": _config("qwen3", 4096, 36, 32, 8, 12288, 151936, theta=1e6),
    "qwen3-32b": _config("qwen3", 5120, 64, 64, 8, 25600, 151936, theta=1e6),
    "mixtral-8x7b": _config("mixtral", 4096, 32, 32, 8, 14336, 32000, theta=1e6),
    "qwen3-30b-a3b": _config("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, theta=1e6) | {"norm_topk_prob": True},
    "smollm2-135m": _config("llama", 576, 30, 9, 3, 1536, 49152, head_dim=64, tied=True),
}


def synthetic_spec(name: str) -> DecoderSpec:
    """The shape of that name. UsageError lists the names."""
    if name not in SYNTHETIC_MODELS:
        raise UsageError(f"--synthetic {name!r} must be one of {', '.join(SYNTHETIC_MODELS)}")
    return decoder_spec(SYNTHETIC_MODELS[name])


def synthetic_model(name: str, scheme: Scheme, config: EngineConfig, gpu: GpuChoice) -> LoadedModel:
    """A model ready to run, its linear layers in `scheme`; embedding and head are dense."""
    spec = synthetic_spec(name)
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    weights = random_weights(spec, scheme, linear_preparer(gpu.dtype), device, gpu.dtype)
    runner, cache, max_model_len = place(config, spec, weights, gpu, None)
    return LoadedModel(
        runner=runner,
        runner_choice=RunnerChoice("cuda", gpu.reason),
        tokenizer=byte_tokenizer(),
        vocab_size=spec.vocab_size,
        num_kv_blocks=cache.num_blocks,
        max_model_len=max_model_len,
        ending_tokens=frozenset(),
        batched_tokens=BATCHED_TOKENS,
    )


def synthetic_engine(name: str, scheme: Scheme, settings: Mapping[str, Any]) -> Engine:
    """An engine with such a model. UsageError where no CUDA kernel runs."""
    if reason := gpu_obstacle():
        raise UsageError(f"--synthetic needs a GPU: {reason}")
    config = EngineConfig(model=name, device="cuda", **settings)
    gpu = gpu_choice(config, "bfloat16")
    return Engine(config, model=synthetic_model(name, scheme, config, gpu))


def random_weights(
    spec: DecoderSpec, scheme: Scheme, prepare: Prepare, device: torch.device, dtype: torch.dtype
) -> DecoderWeights:
    """Weights whose products are of the size of their inputs, divided by the depth where they meet the residual."""
    table = torch.randn(spec.vocab_size, spec.hidden_size, device=device, dtype=dtype) * 0.02
    head = table
    if not spec.tie_word_embeddings:
        head = torch.randn(spec.vocab_size, spec.hidden_size, device=device, dtype=dtype) * 0.02
    experts = None if spec.experts is None else _random_experts(spec, spec.experts, scheme, device, dtype)
    layers = [
        _random_layer(spec, scheme, prepare, device, dtype, copy.deepcopy(experts)) for _ in range(spec.num_layers)
    ]
    final_norm = torch.ones(spec.hidden_size, device=device)
    return DecoderWeights(table, layers, final_norm, Head(QuantizedWeight.dense(head), prepare, device, dtype))


def _random_layer(
    spec: DecoderSpec,
    scheme: Scheme,
    prepare: Prepare,
    device: torch.device,
    dtype: torch.dtype,
    experts: Experts | None,
) -> LayerWeights:
    def layer(*names: str) -> Any:
        rows = sum(spec.linear_shape(name)[0] for name in names)
        bias = torch.zeros(rows, device=device) if spec.has_bias(names[0]) else None
        return prepare(_weight(scheme, rows, spec.linear_shape(names[0])[1], device, dtype), bias)

    def gain(size: int) -> Tensor:
        return torch.ones(size, device=device)

    return LayerWeights(
        qkv=layer(Q, K, V),
        o=layer(O),
        mlp=experts or MlpWeights(layer(GATE, GATE), layer(DOWN)),
        input_norm=gain(spec.hidden_size),
        post_attention_norm=gain(spec.hidden_size),
        q_norm=gain(spec.head_dim) if spec.qk_norm else None,
        k_norm=gain(spec.head_dim) if spec.qk_norm else None,
    )


def _random_experts(
    spec: DecoderSpec, experts: ExpertsSpec, scheme: Scheme, device: torch.device, dtype: torch.dtype
) -> Experts:
    """Those of one layer; every layer gets a copy, as packing thousands of them takes minutes."""
    prepare = grouped_preparer(dtype)

    def layer(rows: int, columns: int) -> PreparedGroupedLinear:
        return prepare([_weight(scheme, rows, columns, device, dtype) for _ in range(experts.num_experts)])

    hidden, inner = spec.hidden_size, experts.intermediate_size
    router = torch.randn(experts.num_experts, hidden, device=device, dtype=dtype) * hidden**-0.5
    return Experts(experts, router, layer(2 * inner, hidden), layer(hidden, inner))


def _weight(scheme: Scheme, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> QuantizedWeight:
    if isinstance(scheme, DenseScheme):
        return QuantizedWeight.dense(torch.randn(rows, columns, device=device, dtype=dtype) * columns**-0.5)
    weight = random_weight(scheme, rows, columns, str(device))
    if not isinstance(scheme, IntegerScheme):
        return weight
    scales = {name: weight[name].to(dtype) for name in ("scales", "offsets") if name in weight.tensors}
    return QuantizedWeight(scheme, {**weight.tensors, **scales}, weight.shape)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i; tokens beyond are padding of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
