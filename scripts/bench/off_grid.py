"""A variant of a Llama checkpoint that computes the same function with weights that lie on no grid.

The sample model was itself quantized in blocks of 32, which flatters quantizers that use such blocks. Here norm gains
are folded into the layers behind them, residual, feed-forward and value channels are permuted, and up/down and v/o
channels rescaled by random factors in [2**-0.5, 2**0.5], all exact rewrites, done in float64 and stored in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.checkpoint.base import Checkpoint
from aphroquant.models.loader import load_embedding, load_final_norm, load_head
from aphroquant.models.spec import DOWN, GATE, INPUT_NORM, POST_ATTENTION_NORM, UP, K, O, Q, V


def write_off_grid(source: Path, directory: Path, seed: int = 0) -> None:
    """Write the variant of `source` (no biases, no q/k norms) to `directory`, replacing it."""
    checkpoint = open_checkpoint(source)
    spec = checkpoint.spec
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm), "only the plain Llama shape"
    random = torch.Generator().manual_seed(seed)
    residual = torch.randperm(spec.hidden_size, generator=random)
    with CheckpointWriter(directory, overwrite=True) as writer:
        writer.add("model.embed_tokens.weight", load_embedding(checkpoint)[:, residual].contiguous())
        for layer in range(spec.num_layers):
            for name, tensor in _block(checkpoint, layer, residual, random).items():
                writer.add(f"{spec.block_prefix(layer)}.{name}.weight", tensor.float().contiguous())
        head = load_head(checkpoint, torch.float64) * load_final_norm(checkpoint, torch.float64)
        writer.add("lm_head.weight", head[:, residual].float().contiguous())
        writer.add("model.norm.weight", torch.ones(spec.hidden_size))
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save_tokenizer(Path(scratch))
            for path in Path(scratch).iterdir():
                writer.add_file(path)
        writer.finish({**checkpoint.config, "tie_word_embeddings": False, "dtype": "float32"})


def _block(checkpoint: Checkpoint, layer: int, residual: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    spec = checkpoint.spec
    prefix = spec.block_prefix(layer)

    def weight(name: str) -> Tensor:
        return checkpoint.weight(f"{prefix}.{name}").dequantize(torch.float64)

    tensors = {}
    for norm, readers in ((INPUT_NORM, (Q, K, V)), (POST_ATTENTION_NORM, (GATE, UP))):
        gain = checkpoint.read(f"{prefix}.{norm}.weight").double()
        tensors |= {name: (weight(name) * gain)[:, residual] for name in readers}
        tensors[norm] = torch.ones_like(gain)
    tensors[O], tensors[DOWN] = weight(O)[residual], weight(DOWN)[residual]

    order, factor = _shuffled(spec.intermediate_size, random)
    tensors[GATE] = tensors[GATE][order]
    tensors[UP] = tensors[UP][order] * factor[:, None]
    tensors[DOWN] = tensors[DOWN][:, order] / factor

    value = tensors[V].view(spec.num_kv_heads, spec.head_dim, -1).clone()
    output = tensors[O].view(spec.hidden_size, spec.num_kv_heads, -1, spec.head_dim).clone()  # heads by the KV head
    for head in range(spec.num_kv_heads):
        order, factor = _shuffled(spec.head_dim, random)
        value[head] = value[head][order] * factor[:, None]
        output[:, head] = output[:, head][..., order] / factor
    tensors[V], tensors[O] = value.flatten(0, 1), output.flatten(1)
    return tensors


def _shuffled(size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A permutation of `size` channels and a factor for each."""
    exponents = torch.rand(size, generator=random, dtype=torch.float64) - 0.5
    return torch.randperm(size, generator=random), 2.0**exponents
