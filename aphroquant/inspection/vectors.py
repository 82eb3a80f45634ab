"""Tensors that are no matrix of a linear layer: norms, biases, scales of the KV cache, and whatever else is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import is_kv_scale
from aphroquant.errors import InputError
from aphroquant.inspection.findings import Finding
from aphroquant.models.spec import LM_HEAD, DecoderSpec
from aphroquant.schemes import Scheme

NEAR_ZERO = 1e-3
LEAST_KV_SCALE, LARGEST_KV_SCALE = 1e-6, 1e3
_DAMAGED = "the file is damaged: get it again"


def tensor_findings(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """One tensor that is not the weight of a module, read in pieces."""
    info = checkpoint.tensors[name]
    if not info.dtype.is_floating_point:
        return
    bad, largest, count = 0, 0.0, 0
    for piece in checkpoint.read_pieces(name):
        values = piece.double() if piece.dtype == torch.float64 else piece.float()
        finite = values.isfinite()
        bad += int((~finite).sum())
        count += values.numel()
        if finite.any():
            largest = max(largest, float(values[finite].abs().max()))
    if bad:
        message = f"{bad} of {count} values are NaN or infinite"
        yield Finding("error", "values-not-finite", name, message, _DAMAGED, info.file.name)
    elif is_kv_scale(name):
        yield from _kv_scale_findings(checkpoint, name)
    elif _is_norm(checkpoint, name) and largest < NEAR_ZERO:
        message = "all values are zero" if largest == 0 else f"no value is larger than {largest:.2g}"
        advice = "a norm multiplies what flows through the model, which ends here: get the tensor again"
        yield Finding("error" if largest == 0 else "warning", "norm-near-zero", name, message, advice, info.file.name)


def kv_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What the scales of the KV cache say together."""
    names = [name for name in checkpoint.tensors if is_kv_scale(name)]
    try:
        layers = checkpoint.spec.num_layers
    except InputError:
        return
    if not names:
        return
    with_scales = {name.partition(".self_attn")[0] for name in names}
    if len(with_scales) < layers:
        message = f"{len(with_scales)} of {layers} layers have scales"
        advice = "engines take 1.0 for the others, which cuts large values off: calibrate them all"
        yield Finding("warning", "kv-scales-missing", "KV-cache scales", message, advice, "")
    values = {float(value) for name in names for value in checkpoint.read(name).float().flatten()}
    if values == {1.0}:
        advice = "they were never calibrated, or the cache was measured to need none"
        yield Finding("info", "kv-scales-default", "KV-cache scales", "all are 1.0", advice, "")


def tied_head_findings(checkpoint: Checkpoint, schemes: Mapping[str, Scheme], spec: DecoderSpec) -> Iterator[Finding]:
    """A stored head beside a config that ties it to the embedding: the same numbers, or another model."""
    if not spec.tie_word_embeddings or LM_HEAD not in schemes:
        return
    file = next((info.file.name for name, info in checkpoint.tensors.items() if name.startswith(LM_HEAD)), "")
    if _same_head(checkpoint):
        message = "is stored although the config ties it to the embedding; both are the same"
        yield Finding("info", "tied-head-stored", LM_HEAD, message, "the tensor can be removed", file)
        return
    message = "is stored, differs from the embedding, and the config ties both"
    advice = 'readers take the embedding in its place: set "tie_word_embeddings": false if the stored head is right'
    yield Finding("error", "tied-head-differs", LM_HEAD, message, advice, file)


def _same_head(checkpoint: Checkpoint) -> bool:
    from aphroquant.models.spec import EMBEDDING

    if EMBEDDING not in checkpoint.schemes():
        return False
    pairs = zip(checkpoint.weight_pieces(LM_HEAD), checkpoint.weight_pieces(EMBEDDING), strict=False)
    return all(
        head.shape == embedding.shape and torch.equal(head.dequantize(), embedding.dequantize())
        for head, embedding in pairs
    )


def _kv_scale_findings(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    file = checkpoint.tensors[name].file.name
    values = checkpoint.read(name).float().flatten().tolist()
    if min(values, default=math.inf) <= 0:
        message = f"{min(values):g} is no positive number"
        advice = "calibrate the KV cache again, or remove its scales"
        yield Finding("error", "kv-scale-not-positive", name, message, advice, file)
    elif min(values) < LEAST_KV_SCALE or max(values) > LARGEST_KV_SCALE:
        message = f"{min(values):g} to {max(values):g} is implausible"
        advice = "a scale is the largest key or value over 448 (or 127): check that it is not a reciprocal"
        yield Finding("warning", "kv-scale-implausible", name, message, advice, file)


def _is_norm(checkpoint: Checkpoint, name: str) -> bool:
    """Norms of families whose norms multiply by the weight itself (Gemma's by one more than it)."""
    if "norm" not in name.rpartition(".")[0].rpartition(".")[2] or not name.endswith(".weight"):
        return False
    try:
        return checkpoint.spec.num_layers > 0
    except InputError:
        return False
