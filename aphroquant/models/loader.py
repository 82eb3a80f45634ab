"""From a checkpoint to the parts of a decoder: one block at a time, embedding, head, final norm.

Every part is checked against the spec before use: a missing tensor or a shape that contradicts config.json is an
InputError naming it. Modules may be dense or quantized in any mixture, whatever the checkpoint's format.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.errors import InputError
from aphroquant.kernels.reference import matmul
from aphroquant.models.decoder import DecoderBlock, Linear
from aphroquant.models.spec import (
    EMBEDDING,
    FINAL_NORM,
    INPUT_NORM,
    K_NORM,
    LM_HEAD,
    POST_ATTENTION_NORM,
    Q_NORM,
    DecoderSpec,
)
from aphroquant.schemes import QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint

MakeLinear = Callable[[str, QuantizedWeight, Tensor | None], Linear]  # module name, weight, bias


def dense_linear(name: str, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Linear:
    """x @ W.T + bias with the weight dequantized once, in `dtype`."""
    matrix = weight.dequantize(dtype)  # [N, K]
    shift = None if bias is None else bias.to(dtype)
    return lambda x: matmul.linear(x, matrix, shift)


def load_block(
    checkpoint: Checkpoint,
    layer: int,
    dtype: torch.dtype = torch.float32,
    make_linear: MakeLinear | None = None,
) -> DecoderBlock:
    """Block `layer` with its norms in `dtype`. `make_linear` chooses how linears compute (default: dense_linear)."""
    spec = checkpoint.spec
    prefix = spec.block_prefix(layer)
    make = make_linear or partial(dense_linear, dtype=dtype)
    linears = {}
    for linear in spec.linears(layer):
        module = f"{prefix}.{linear}"
        weight = _weight(checkpoint, module, spec.linear_shape(linear))
        bias = _bias(checkpoint, spec, module, linear)
        linears[linear] = make(module, weight, bias)
    norms = {
        name: _vector(checkpoint, f"{prefix}.{name}.weight", size).to(dtype) for name, size in _norm_sizes(spec).items()
    }
    return DecoderBlock(spec, layer, linears, norms, _router(checkpoint, layer, dtype))


def load_embedding(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensor:
    """The token embedding [V, H]."""
    return _vocabulary_matrix(checkpoint, EMBEDDING, LM_HEAD).dequantize(dtype)


def load_head(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensor:
    """The output projection [V, H].

    A stored head is used even if config.json says tied (as transformers does): it may be quantized on its own.
    """
    return _vocabulary_matrix(checkpoint, LM_HEAD, EMBEDDING).dequantize(dtype)


def load_final_norm(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Tensor:
    """The gain [H] of the norm before the head."""
    return _vector(checkpoint, f"{FINAL_NORM}.weight", checkpoint.spec.hidden_size).to(dtype)


def _vocabulary_matrix(checkpoint: Checkpoint, module: str, tied_to: str) -> QuantizedWeight:
    """Embedding or head; if the two are tied, whichever is stored."""
    spec = checkpoint.spec
    if spec.tie_word_embeddings and module not in checkpoint.schemes():
        module = tied_to
    return _weight(checkpoint, module, (spec.vocab_size, spec.hidden_size))


def load_router(checkpoint: Checkpoint, layer: int) -> QuantizedWeight | None:
    """The weight [experts, H] of what chooses the experts, in a block that has them."""
    experts = checkpoint.spec.experts
    if experts is None or not experts.layers[layer]:
        return None
    module = f"{checkpoint.spec.block_prefix(layer)}.{experts.router}"
    return _weight(checkpoint, module, (experts.num_experts, checkpoint.spec.hidden_size))


def _router(checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> Linear | None:
    """Computed in `dtype` whatever linears do: a small error here is another expert."""
    weight = load_router(checkpoint, layer)
    return None if weight is None else dense_linear("", weight, None, dtype)


def _norm_sizes(spec: DecoderSpec) -> dict[str, int]:
    sizes = {INPUT_NORM: spec.hidden_size, POST_ATTENTION_NORM: spec.hidden_size}
    if spec.qk_norm:
        sizes |= {Q_NORM: spec.head_dim, K_NORM: spec.head_dim}
    return sizes


def _weight(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> QuantizedWeight:
    if module not in checkpoint.schemes():
        raise InputError(f"{checkpoint.source}: {module}.weight is missing")
    weight = checkpoint.weight(module)
    if weight.shape != shape:
        raise InputError(
            f"{checkpoint.source}: {module} has shape {list(weight.shape)}, but config.json makes it {list(shape)}"
        )
    return weight


def _bias(checkpoint: Checkpoint, spec: DecoderSpec, module: str, linear: str) -> Tensor | None:
    name = f"{module}.bias"
    out_features = spec.linear_shape(linear)[0]
    if spec.has_bias(linear):
        return _vector(checkpoint, name, out_features)
    # Some quantizers write a bias of zeros for every layer; any other would be left out by whoever trusts config.json.
    if checkpoint.has(name) and bool(_vector(checkpoint, name, out_features).any()):
        raise InputError(
            f"{checkpoint.source}: {name} is not zero, but config.json gives this model no bias there",
            hint="set attention_bias or mlp_bias in config.json if the model was trained with it",
        )
    return None


def _vector(checkpoint: Checkpoint, name: str, size: int) -> Tensor:
    if not checkpoint.has(name):
        raise InputError(f"{checkpoint.source}: {name} is missing")
    vector = checkpoint.read(name)
    if tuple(vector.shape) != (size,):
        raise InputError(
            f"{checkpoint.source}: {name} has shape {list(vector.shape)}, but config.json makes it [{size}]"
        )
    return vector
