"""gguf-py dequantizes the tensors of a GGUF file, or quantizes and writes one.

`settings`: `types`, quantization types taken in turn by the layers. Rows of q and k are in llama.cpp's order for rotary
embeddings inside the file, and in transformers' outside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from exchange import serve
from safetensors.torch import load_file

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def load(request: dict[str, Any]) -> Any:
    reader = gguf.GGUFReader(request["checkpoint"])
    weights, types = {}, set()
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if parts[0] in WHOLE and values.ndim == 2:
            weights[WHOLE[parts[0]]] = torch.from_numpy(values.copy())
        if parts[0] != "blk" or parts[2] not in NAMES:
            continue
        if parts[2] in HEADS:
            heads = int(reader.get_field(f"llama.{HEADS[parts[2]]}").contents())
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        weights[f"model.layers.{parts[1]}.{NAMES[parts[2]]}"] = torch.from_numpy(values.copy())
        types.add(tensor.tensor_type.name)
    return weights, None, {"types": sorted(types)}


def save(request: dict[str, Any]) -> Any:
    config = json.loads((Path(request["source"]) / "config.json").read_text())
    tensors = load_file(Path(request["source"]) / "model.safetensors")
    place = Path(request["checkpoint"])
    place.mkdir(parents=True, exist_ok=True)
    request["checkpoint"] = str(place / "model.gguf")
    writer = gguf.GGUFWriter(request["checkpoint"], "llama")
    add_metadata(writer, config, Path(request["source"]))
    for name, module in WHOLE.items():
        writer.add_tensor(f"{name}.weight", tensors[f"{module}.weight"].numpy())
    types, number = request["settings"]["types"], 0
    for layer in range(config["num_hidden_layers"]):
        for name, module in NORMS.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensors[f"model.layers.{layer}.{module}.weight"].numpy())
        for name, module in NAMES.items():
            values = tensors[f"model.layers.{layer}.{module}.weight"].numpy()
            if name in HEADS:
                heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            kind = gguf.GGMLQuantizationType[types[number % len(types)]]
            writer.add_tensor(f"blk.{layer}.{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
            number += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load(request)


def add_metadata(writer: Any, config: dict[str, Any], source: Path) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{number}>" for number in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])


if __name__ == "__main__":
    serve(load, save)
