"""Tiny quantized checkpoints, one of each scheme that a format holds, filled with random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, GgufTensorPlan, GgufWriter
from aphroquant.formats import format_class
from aphroquant.formats.gguf import BLOCK_TYPES, BlockType
from aphroquant.models.spec import decoder_spec
from aphroquant.schemes import (
    ActivationScheme,
    AdditiveScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

WIDTH, INNER, VOCABULARY, EXPERTS = 256, 256, 260, 2
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
PER_TOKEN = ActivationScheme("float")
STATIC = ActivationScheme("float", dynamic=False, granularity="tensor")
BLOCK_INPUTS = ActivationScheme("float", granularity="group", group_size=128)
FP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)
NVFP4, MXFP4 = LookupScheme("e2m1", 16, "e4m3"), LookupScheme("e2m1", 32, "e8m0")


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint: its format, what its numbers are, and for people their usual name."""

    format: str
    scheme: Scheme
    name: str


def integers(bits: int, group_size: int | None, symmetric: bool, **more: Any) -> IntegerScheme:
    return IntegerScheme(bits, group_size, symmetric, **more)


SOURCES = [
    Source("gptq", integers(4, 32, True), "4 bit symmetric g32"),
    Source("gptq", integers(4, 128, False), "4 bit with zero points g128"),
    Source("gptq", integers(4, 32, True, act_order=True), "4 bit act-order g32"),
    Source("gptq", integers(3, 64, False), "3 bit with zero points g64"),
    Source("gptq", integers(2, 64, True), "2 bit symmetric g64"),
    Source("gptq", integers(8, 32, True), "8 bit symmetric g32"),
    Source("gptq", integers(8, 32, False), "8 bit with zero points g32"),
    Source("awq", integers(4, 128, False), "4 bit with zero points g128"),
    Source("auto-round", integers(4, 128, True), "4 bit symmetric g128"),
    Source("compressed-tensors", integers(4, 128, True), "W4A16 symmetric g128"),
    Source("compressed-tensors", integers(4, 128, False), "W4A16 with zero points g128"),
    Source("compressed-tensors", integers(5, 64, True), "W5A16 symmetric g64"),
    Source("compressed-tensors", integers(8, None, True), "W8A16 a scale a row"),
    Source("compressed-tensors", integers(8, None, True, activations=ActivationScheme("int")), "W8A8 int8"),
    Source("compressed-tensors", FloatScheme("channel", activations=PER_TOKEN), "FP8 dynamic"),
    Source("compressed-tensors", FloatScheme("tensor", activations=STATIC), "FP8 static"),
    Source("compressed-tensors", FloatScheme("block", (128, 128), BLOCK_INPUTS), "FP8 blocks"),
    Source("compressed-tensors", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS), "NVFP4"),
    Source("compressed-tensors", NVFP4, "NVFP4A16"),
    Source("compressed-tensors", MXFP4, "MXFP4A16"),
    Source("fp8", FloatScheme("tensor", activations=PER_TOKEN), "a scale a tensor, dynamic"),
    Source("fp8", FloatScheme("tensor", activations=STATIC), "a scale a tensor, static"),
    Source("fp8", FloatScheme("block", (128, 128), BLOCK_INPUTS), "blocks of 128 x 128"),
    Source("modelopt", FloatScheme("tensor", activations=STATIC), "FP8"),
    Source("modelopt", FloatScheme("channel", activations=PER_TOKEN), "FP8 per channel and token"),
    Source("modelopt", LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS), "NVFP4"),
    Source("modelopt", NVFP4, "W4A16 NVFP4"),
    Source("mxfp4", MXFP4, "gpt-oss experts"),
    Source("bitsandbytes", LookupScheme("nf4", 64, "float", flattened=True), "NF4"),
    Source("bitsandbytes", LookupScheme("nf4", 64, "nested", flattened=True), "NF4 double quantization"),
    Source("bitsandbytes", LookupScheme("fp4", 64, "float", flattened=True), "FP4"),
    Source("bitsandbytes", integers(8, None, True), "LLM.int8"),
    Source("hqq", AffineScheme(4, 64), "4 bit real zero points g64"),
    Source("aqlm", AdditiveScheme(2, 8), "2x8"),
    *(
        Source("gguf", kind.scheme, kind.name)
        for kind in BLOCK_TYPES.values()
        if not isinstance(kind.scheme, DenseScheme)
    ),
]


def write_source(source: Source, folder: Path) -> dict[str, QuantizedWeight]:
    """Write the checkpoint, and return what its quantized weights are; `path_of` says where."""
    torch.manual_seed(0)
    if source.format == "mxfp4":
        return _write_experts(source, folder)
    spec = decoder_spec(CONFIG)
    weights = {
        module: random_weight(source.scheme, *spec.linear_shape(module.split(".", 3)[3])) for module in spec.modules()
    }
    vectors = {
        name: torch.rand(WIDTH) for name in ("model.norm.weight", *(f"model.layers.0.{norm}.weight" for norm in _NORMS))
    }
    dense = {"model.embed_tokens.weight": torch.randn(VOCABULARY, WIDTH).half(), **vectors}
    if source.format == "gguf":
        _write_gguf(source, folder, weights, dense)
    else:
        _write_directory(source, folder, weights, dense, CONFIG)
    return weights


def path_of(source: Source, folder: Path) -> Path:
    """The checkpoint that `write_source` made."""
    return folder / "model.gguf" if source.format == "gguf" else folder


def random_weight(scheme: Scheme, rows: int, columns: int) -> QuantizedWeight:
    """Random codes; scales that float16 holds; zero points among the codes."""
    shapes = dict(scheme.shapes(rows, columns))
    if isinstance(scheme, FloatScheme | IntegerScheme) and scheme.activations and not scheme.activations.dynamic:
        shapes["input_scale"] = ()
    return QuantizedWeight(
        scheme, {name: _random(scheme, name, shape) for name, shape in shapes.items()}, (rows, columns)
    )


_NORMS = ("input_layernorm", "post_attention_layernorm")
_DTYPES = {"global_scale": torch.float64, "input_scale": torch.float32}


def _random(scheme: Scheme, name: str, shape: tuple[int, ...]) -> Tensor:
    bits, dtype = scheme.storage_bits(name), scheme.dtypes().get(name, _DTYPES.get(name, torch.float16))
    if name == "codes" and isinstance(scheme, FloatScheme):
        return torch.randn(shape).to(scheme.dtype)
    if name == "group_index":
        assert isinstance(scheme, IntegerScheme)
        return (torch.randperm(shape[0]) // (scheme.group_size or shape[0])).to(torch.int32)
    if isinstance(scheme, LookupScheme) and name == "input_scale":
        return torch.tensor(0.5, dtype=torch.float64)
    if name == "global_scale":
        return torch.tensor(2.0**-7 * 1.25, dtype=torch.float64)
    if dtype == torch.int8:
        return torch.randint(-32, 32, shape, dtype=torch.int8)
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(110, 125, shape, dtype=torch.uint8).view(dtype)
    is_integer = (
        name == "codes" or name.startswith("sub_") or (name == "zeros" and not isinstance(scheme, AffineScheme))
    )
    if is_integer:
        return torch.randint(0, 2 ** (bits or 8), shape, dtype=torch.uint8)
    if name == "scales" and dtype == torch.uint8:  # nested
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    values = torch.rand(shape).mul(0.1).add(0.001)
    return values if name.startswith("nested") else values.half().to(dtype)


def _write_directory(
    source: Source,
    folder: Path,
    weights: Mapping[str, QuantizedWeight],
    dense: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> None:
    written = format_class(source.format).for_schemes(dict.fromkeys(weights, source.scheme), ["lm_head"])
    stacks: dict[str, dict[int, Tensor]] = {}
    with CheckpointWriter(folder) as writer:
        for name, tensor in dense.items():
            writer.add(name, tensor)
        for module, weight in weights.items():
            for suffix, tensor in written.write(module, weight).items():
                name, entry = written.place(module, suffix)
                if entry is None:
                    writer.add(name, tensor)
                else:
                    stacks.setdefault(name, {})[entry] = tensor
        for name, entries in stacks.items():
            writer.add(name, torch.stack([entries[number] for number in sorted(entries)]))
        for name, content in _tokenizer_files().items():
            writer.write_json(name, content)
        writer.finish({**config, "quantization_config": written.quantization_config()})


def _write_experts(source: Source, folder: Path) -> dict[str, QuantizedWeight]:
    shapes = {"gate_up_proj": (2 * WIDTH, WIDTH), "down_proj": (WIDTH, WIDTH)}
    weights = {
        f"model.layers.0.mlp.experts.{expert}.{name}": random_weight(source.scheme, *shape)
        for name, shape in shapes.items()
        for expert in range(EXPERTS)
    }
    _write_directory(source, folder, weights, {"model.norm.weight": torch.rand(WIDTH)}, {"model_type": "gpt_oss"})
    return weights


def _write_gguf(
    source: Source, folder: Path, weights: Mapping[str, QuantizedWeight], dense: Mapping[str, Tensor]
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    tokenizer_file = folder / "tokenizer-of-the-source.json"
    tokenizer_file.write_text(json.dumps(_tokenizer_files()["tokenizer.json"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    kind = _block_type(source.name)
    plan = {name: GgufTensorPlan(tuple(t.shape), "F32" if t.ndim == 1 else "F16") for name, t in dense.items()}
    plan |= {f"{module}.weight": GgufTensorPlan(weight.shape, kind.name) for module, weight in weights.items()}
    with GgufWriter(folder / "model.gguf", CONFIG, tokenizer) as writer:
        writer.plan(plan)
        for name, tensor in dense.items():
            writer.add(name, tensor)
        for module, weight in weights.items():
            writer.add(f"{module}.weight", weight)
        writer.finish()


def _block_type(name: str) -> BlockType:
    return next(kind for kind in BLOCK_TYPES.values() if kind.name == name)


def _tokenizer_files() -> dict[str, Any]:
    """A byte-level tokenizer with one merge."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": [["a", "b"]]}
    tokenizer = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "decoder": level}
    return {
        "tokenizer.json": {**tokenizer, "post_processor": None, "model": model},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
