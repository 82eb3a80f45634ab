"""Size of a checkpoint as stored: bytes, and bits for each weight of the model that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import COMPANIONS
from aphroquant.models.spec import DecoderSpec


@dataclass(frozen=True)
class StoredSize:
    """Bytes of all tensors; bits per weight of the whole model, and of the linear layers in its blocks.

    Everything that a file stores counts: scales, zero points, padding. Biases are no part of a linear's weight.
    """

    num_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float


def stored_size(checkpoint: Checkpoint) -> StoredSize:
    """The size, measured from the headers alone."""
    spec = checkpoint.spec
    linears = set(spec.modules())
    linear_bytes = sum(
        info.nbytes
        for name, info in checkpoint.tensors.items()
        if _is_part(name, linears) and name.rpartition(".")[2] not in COMPANIONS
    )
    return StoredSize(
        num_bytes=checkpoint.num_bytes,
        bits_per_weight=8 * checkpoint.num_bytes / num_parameters(spec),
        linear_bits_per_weight=8 * linear_bytes / _num_linear_weights(spec),
    )


def _is_part(name: str, linears: set[str]) -> bool:
    """Whether a tensor belongs to one of these, at any depth: bitsandbytes has LINEAR.weight.absmax."""
    while name := name.rpartition(".")[0]:
        if name in linears:
            return True
    return False


def num_parameters(spec: DecoderSpec) -> int:
    """Parameters of the dense model; a tied embedding counts once."""
    matrices = 1 if spec.tie_word_embeddings else 2
    norms = 2 * spec.hidden_size + (2 * spec.head_dim if spec.qk_norm else 0)
    outside = matrices * spec.vocab_size * spec.hidden_size + spec.hidden_size
    blocks = range(spec.num_layers)
    linears = [linear for layer in blocks for linear in spec.linears(layer)]
    biases = sum(spec.linear_shape(linear)[0] for linear in linears if spec.has_bias(linear))
    routers = 0
    if spec.experts is not None:
        routers = sum(spec.experts.layers) * spec.experts.num_experts * spec.hidden_size
    return outside + _num_linear_weights(spec) + routers + biases + spec.num_layers * norms


def _num_linear_weights(spec: DecoderSpec) -> int:
    linears = (linear for layer in range(spec.num_layers) for linear in spec.linears(layer))
    return sum(rows * columns for rows, columns in map(spec.linear_shape, linears))
