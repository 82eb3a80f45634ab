"""Tiny sound checkpoints of every format that is read: name -> {file name: bytes}. Made once a run, from a seed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter
from aphroquant.formats import format_class
from aphroquant.formats.base import Format
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
    TrellisScheme,
)
from fuzzing.gguf_corpus import GGUF_TYPES, gguf_checkpoint
from fuzzing.tokenizers import tokenizer_files

Files = dict[str, bytes]

HIDDEN, INTERMEDIATE, VOCABULARY = 128, 128, 384
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
}
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BLOCK = "model.layers.0"
FP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)
STATIC = ActivationScheme("float", dynamic=False, granularity="tensor")
DYNAMIC = ActivationScheme("float")
BLOCK_INPUTS = ActivationScheme("float", granularity="group", group_size=64)
INT8_INPUTS = ActivationScheme("int")
_WITHOUT_INPUTS = (AdditiveScheme, AffineScheme, TrellisScheme, KQuantScheme, DenseScheme)
PACKED = IntegerScheme(4, 32, symmetric=False)
INT8 = IntegerScheme(8, None, symmetric=True, activations=INT8_INPUTS)

# name -> (format, scheme of all layers, scheme of down_proj)
QUANTIZED: Mapping[str, tuple[str, Scheme, Scheme | None]] = {
    "gptq": ("gptq", IntegerScheme(4, 32, symmetric=True), None),
    "gptq-mixed": ("gptq", IntegerScheme(4, 32, symmetric=False, act_order=True), IntegerScheme(8, 64, symmetric=True)),
    "gptq-3bit": ("gptq", IntegerScheme(3, 64, symmetric=True), None),
    "awq": ("awq", IntegerScheme(4, 64, symmetric=False), None),
    "auto-round": ("auto-round", IntegerScheme(4, 32, symmetric=True), IntegerScheme(2, 64, symmetric=True)),
    "auto-round-awq": ("auto-round", IntegerScheme(4, 32, symmetric=False), None),
    "aqlm": ("aqlm", AdditiveScheme(2, 8), None),
    "bitsandbytes": ("bitsandbytes", LookupScheme("nf4", 64, "nested", flattened=True), None),
    "bitsandbytes-fp4": ("bitsandbytes", LookupScheme("fp4", 64, "float", flattened=True), None),
    "bitsandbytes-int8": ("bitsandbytes", IntegerScheme(8, None, symmetric=True), None),
    "compressed-tensors": ("compressed-tensors", PACKED, None),
    "compressed-tensors-3bit": ("compressed-tensors", IntegerScheme(3, None, symmetric=True), None),
    "compressed-tensors-int8": ("compressed-tensors", INT8, None),
    "compressed-tensors-fp8": ("compressed-tensors", FloatScheme("tensor", activations=STATIC), None),
    "compressed-tensors-nvfp4": ("compressed-tensors", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS), None),
    "compressed-tensors-mxfp4": ("compressed-tensors", LookupScheme("e2m1", 32, "e8m0"), None),
    "compressed-tensors-mixed": ("compressed-tensors", PACKED, FloatScheme("channel", activations=DYNAMIC)),
    "exl3": ("exl3", TrellisScheme(3, "mcg"), TrellisScheme(2.5, "mul1")),
    "fp8": ("fp8", FloatScheme("tensor", activations=STATIC), None),
    "fp8-block": ("fp8", FloatScheme("block", (64, 64), activations=BLOCK_INPUTS), None),
    "hqq": ("hqq", AffineScheme(3, 64), AffineScheme(2, None, axis=0)),
    "modelopt": ("modelopt", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS), None),
    "modelopt-mixed": ("modelopt", FloatScheme("tensor", activations=STATIC), LookupScheme("e2m1", 16, "e4m3")),
}  # fmt: skip


def names() -> list[str]:
    return [*QUANTIZED, *_OTHERS, *(f"gguf-{name.lower()}" for name in GGUF_TYPES), "gguf-sentencepiece"]


def checkpoint_files(name: str) -> Files:
    """The files of one sound checkpoint."""
    torch.manual_seed(len(name))
    if name == "gguf-sentencepiece":
        return gguf_checkpoint("Q4_0", sentencepiece=True)
    if name.startswith("gguf-"):
        return gguf_checkpoint(name.removeprefix("gguf-").upper())
    return _OTHERS[name]() if name in _OTHERS else _quantized(*QUANTIZED[name])


def _quantized(format_name: str, scheme: Scheme, scheme_of_down: Scheme | None) -> Files:
    schemes = {f"{BLOCK}.{linear}": scheme for linear in LINEARS}
    schemes[f"{BLOCK}.mlp.down_proj"] = scheme_of_down or scheme
    format = format_class(format_name).for_schemes(schemes, [])
    tensors: dict[str, Tensor] = {}
    for module, own in schemes.items():
        weight = random_weight(own, *LINEARS[module.removeprefix(f"{BLOCK}.")])
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in format.write(module, weight).items()}
    return _written(tensors | _dense_tensors(linears=False) | _kv_scales(), format)


def random_weight(scheme: Scheme, n: int, k: int) -> QuantizedWeight:
    """Random codes under small positive scales."""
    shapes = scheme.shapes(n, k)
    activations = None if isinstance(scheme, _WITHOUT_INPUTS) else scheme.activations
    if activations is not None and not activations.dynamic:
        shapes["input_scale"] = ()
    return QuantizedWeight(scheme, {name: _random(scheme, name, shape, k) for name, shape in shapes.items()}, (n, k))


def _random(scheme: Scheme, name: str, shape: tuple[int, ...], k: int) -> Tensor:
    if name == "group_index":
        assert isinstance(scheme, IntegerScheme)
        return (torch.randperm(k) // (k // scheme.num_groups(k))).to(torch.int32)
    if isinstance(scheme, FloatScheme) and name == "codes":
        return torch.randn(shape).to(torch.float8_e4m3fn)
    dtype = scheme.dtypes().get(name)
    if name == "codes" or (name == "zeros" and isinstance(scheme, IntegerScheme)):
        dtype = dtype or torch.uint8
    if dtype is not None and not dtype.is_floating_point:
        bits = 32 if dtype == torch.int32 else scheme.storage_bits(name) or 8
        low = -(2**31) if dtype == torch.int32 else 0
        return torch.randint(low, low + 2**bits, shape).to(dtype)
    powers = torch.exp2(torch.randint(-6, -2, shape).float())
    if name in ("global_scale", "input_scale"):
        return powers.to(torch.float64 if isinstance(scheme, LookupScheme) else torch.float32)
    single = isinstance(scheme, FloatScheme | LookupScheme)
    return powers.to(dtype or (torch.float32 if single else torch.float16))


def _kv_scales() -> dict[str, Tensor]:
    return {f"{BLOCK}.self_attn.{which}_scale": torch.tensor([0.5]) for which in "kv"}


def _dense_tensors(*, linears: bool) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
        f"{BLOCK}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{BLOCK}.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }
    if linears:
        tensors |= {f"{BLOCK}.{name}.weight": torch.randn(shape) / 8 for name, shape in LINEARS.items()}
    return {name: tensor.half() for name, tensor in tensors.items()}


def _written(tensors: Mapping[str, Tensor], format: Format | None, *, shard_bytes: int = 2**40) -> Files:
    config = MODEL | ({"quantization_config": format.quantization_config()} if format else {})
    with tempfile.TemporaryDirectory() as folder:
        with CheckpointWriter(Path(folder) / "model", shard_bytes=shard_bytes) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            for name, content in (format.side_files() if format else {}).items():
                writer.write_json(name, content)
            writer.finish(config)
        files = {path.name: path.read_bytes() for path in (Path(folder) / "model").iterdir()}
    return files | tokenizer_files()


def _dense() -> Files:
    return _written(_dense_tensors(linears=True), None)


def _sharded() -> Files:
    return _written(_dense_tensors(linears=True), None, shard_bytes=2**17)


def _older_config(format_name: str, file_name: str, config: Mapping[str, Any]) -> Files:
    """The quantization settings in a file of their own, as older tools wrote them."""
    files = _quantized(format_name, IntegerScheme(4, 32, symmetric=format_name == "gptq"), None)
    files["config.json"] = json.dumps(MODEL).encode()
    return files | {file_name: json.dumps(config).encode()}


def _older_gptq() -> Files:
    return _older_config("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "sym": True, "desc_act": False})


def _older_awq() -> Files:
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    return _older_config("awq", "quant_config.json", config)


def _patterns() -> Files:
    """GPTQ with regular expressions for the modules."""
    files = _quantized("gptq", IntegerScheme(4, 32, symmetric=True), None)
    config = json.loads(files["config.json"])
    config["quantization_config"]["dynamic"] = {r"+:.*\.0\.mlp\..*": {"bits": 4}, r"-:.*\.7\..*": {}}
    return files | {"config.json": json.dumps(config).encode()}


def _gpt_oss() -> Files:
    scheme = LookupScheme("e2m1", 32, "e8m0")
    tensors: dict[str, Tensor] = dict(_dense_tensors(linears=False))
    for name, shape in (("gate_up_proj", (2 * INTERMEDIATE, HIDDEN)), ("down_proj", (HIDDEN, INTERMEDIATE))):
        weights = [random_weight(scheme, *shape) for _ in range(2)]
        stacked = f"{BLOCK}.mlp.experts.{name}"
        codes = torch.stack([weight["codes"] for weight in weights]).view(2, shape[0], shape[1] // 32, 32)
        tensors[f"{stacked}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).contiguous()
        tensors[f"{stacked}_scales"] = torch.stack([weight["scales"] for weight in weights]).view(torch.uint8)
    files = _written(tensors, None)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = MODEL | {"quantization_config": quantization}
    return files | {"config.json": json.dumps(config).encode()}


_OTHERS: Mapping[str, Callable[[], Files]] = {
    "safetensors": _dense,
    "safetensors-sharded": _sharded,
    "gptq-older": _older_gptq,
    "gptq-patterns": _patterns,
    "awq-older": _older_awq,
    "mxfp4": _gpt_oss,
}
