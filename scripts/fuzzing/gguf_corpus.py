"""Tiny GGUF files, written with the gguf package, of every tensor type that is read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from aphroquant.formats.gguf import ENCODABLE, block_type, encode, quantize
from fuzzing.tokenizers import TEMPLATE, merges, tokens

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 256, 256, 384, 2
GGUF_TYPES = (*ENCODABLE, "NVFP4")
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN, HIDDEN),
    "attn_v": (HIDDEN, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def gguf_checkpoint(name: str, *, sentencepiece: bool = False) -> dict[str, bytes]:
    """{"model.gguf": bytes}: a llama of one layer, its matrices of type `name`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        _add_model(writer)
        _add_sentencepiece(writer) if sentencepiece else _add_bpe(writer)
        random = torch.Generator().manual_seed(0)
        for tensor in ("token_embd", "output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            shape = (VOCABULARY, HIDDEN) if tensor == "token_embd" else (HIDDEN,)
            writer.add_tensor(f"{tensor}.weight", torch.randn(shape, generator=random).numpy())
        for tensor, shape in SHAPES.items():
            weight = torch.randn(shape, generator=random) / 16
            writer.add_tensor(f"blk.0.{tensor}.weight", *_stored(name, weight))
            if name == "NVFP4":
                writer.add_tensor(f"blk.0.{tensor}.scale", np.array([0.5], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"model.gguf": path.read_bytes()}


def _stored(name: str, weight: torch.Tensor) -> tuple[Any, ...]:
    """Array of bytes [N, bytes of a row], its shape and its type, as add_tensor takes them."""
    kind = gguf.GGMLQuantizationType[name]
    if name == "NVFP4":
        rows = torch.randint(0, 120, (weight.shape[0], weight.shape[1] // 64 * 36)).to(torch.uint8)
    else:
        rows = encode(block_type(name), quantize(block_type(name), weight))
    if name in ("F32", "F16"):
        dtype = np.float32 if name == "F32" else np.float16
        return (rows.numpy().view(dtype).reshape(weight.shape),)
    return rows.numpy(), None, kind


def _add_model(writer: Any) -> None:
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)


def _add_bpe(writer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens())
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(tokens()))])
    writer.add_token_merges(merges())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _add_sentencepiece(writer: Any) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([float(-index) for index in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 5])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(True)
