"""What a decoder of a given shape must have: its matrices and its other tensors, by name."""

from __future__ import annotations

from aphroquant.checkpoint.base import Checkpoint
from aphroquant.errors import InputError
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


def expected_modules(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Every matrix of the model: module name -> (out_features, in_features)."""
    modules = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        for linear in spec.linears(layer):
            modules[f"{spec.block_prefix(layer)}.{linear}"] = spec.linear_shape(linear)
        if spec.experts is not None and spec.has_experts(layer):
            modules[f"{spec.block_prefix(layer)}.{spec.experts.router}"] = (spec.experts.num_experts, spec.hidden_size)
    if not spec.tie_word_embeddings:
        modules[LM_HEAD] = (spec.vocab_size, spec.hidden_size)
    return modules


def expected_vectors(spec: DecoderSpec) -> dict[str, int]:
    """Every norm and bias: tensor name -> length."""
    vectors = {f"{FINAL_NORM}.weight": spec.hidden_size}
    norms = {INPUT_NORM: spec.hidden_size, POST_ATTENTION_NORM: spec.hidden_size}
    if spec.qk_norm:
        norms |= {Q_NORM: spec.head_dim, K_NORM: spec.head_dim}
    for layer in range(spec.num_layers):
        prefix = spec.block_prefix(layer)
        vectors |= {f"{prefix}.{norm}.weight": length for norm, length in norms.items()}
        biased = [linear for linear in spec.linears(layer) if spec.has_bias(linear)]
        vectors |= {f"{prefix}.{linear}.bias": spec.linear_shape(linear)[0] for linear in biased}
    return vectors


def module_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the modules, as the model wants them; of others, as a dense weight says."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2:
            shapes[name.removesuffix(".weight")] = (info.shape[0], info.shape[1])
    try:
        spec = checkpoint.spec
    except InputError:
        return shapes
    return {**expected_modules(spec), **shapes}
