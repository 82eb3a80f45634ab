"""GGUF files made from the tiny checkpoints by gguf-py, with llama.cpp's names and row order."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TinyGguf = Callable[..., Path]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="session")
def tiny_gguf(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> TinyGguf:
    """`tiny_gguf(family, quantization, metadata, **overrides)`: a GGUF file of `tiny_checkpoint(family, **overrides)`.

    `quantization` is a ggml type for all matrices; `metadata` adds or replaces entries (None removes one).
    """

    def make(
        family: str = "llama", quantization: str = "F32", metadata: dict[str, Any] | None = None, **overrides: Any
    ) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"{family}-{quantization}.gguf"
        _write(tiny_checkpoint(family, **overrides), path, family, quantization, metadata or {})
        return path

    return make


def _write(source: Path, target: Path, family: str, quantization: str, changes: dict[str, Any]) -> None:
    import json

    import gguf
    import safetensors.numpy

    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(target, family)
    for key, value in (_metadata(config, family, source) | changes).items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in safetensors.numpy.load_file(source / "model.safetensors").items():
        tensor = _permuted(name, tensor, config) if family == "llama" else tensor
        if tensor.ndim == 1:
            writer.add_tensor(_gguf_name(name), tensor)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{suffix}"
    _, _, layer, within = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[within]}.{suffix}"


def _permuted(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """llama.cpp's order of the rows of q and k: the two halves of a head interleaved."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    split = tensor.reshape(config[heads], 2, -1, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def _metadata(config: dict[str, Any], family: str, source: Path) -> dict[str, Any]:
    import json

    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    return {
        f"{family}.block_count": config["num_hidden_layers"],
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.embedding_length": config["hidden_size"],
        f"{family}.feed_forward_length": config["intermediate_size"],
        f"{family}.attention.head_count": config["num_attention_heads"],
        f"{family}.attention.head_count_kv": config["num_key_value_heads"],
        f"{family}.attention.key_length": config["head_dim"],
        f"{family}.attention.value_length": config["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{family}.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2" if family.startswith("qwen") else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.chat_template": (source / "chat_template.jinja").read_text(),
    }
