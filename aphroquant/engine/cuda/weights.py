"""From a checkpoint to the parts of a decoder on the device, one layer at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.engine.cuda.experts import Experts, PrepareGrouped, make_experts
from aphroquant.engine.cuda.linears import Head, Linear, Part, Prepare, joint_linear
from aphroquant.models.loader import load_block, load_embedding, load_final_norm, load_router
from aphroquant.models.spec import (
    DOWN,
    GATE,
    INPUT_NORM,
    K_NORM,
    LM_HEAD,
    POST_ATTENTION_NORM,
    Q_NORM,
    UP,
    K,
    O,
    Q,
    V,
)  # fmt: skip
from aphroquant.schemes import QuantizedWeight

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint


@dataclass(frozen=True)
class MlpWeights:
    """Gate and up joined, and down."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class LayerWeights:
    """One block: joint projections, and gains in float32."""

    qkv: Linear
    o: Linear
    mlp: MlpWeights | Experts
    input_norm: Tensor
    post_attention_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder. `embedding` [V, H] is in the dtype that the decoder computes in."""

    embedding: Tensor
    layers: list[LayerWeights]
    final_norm: Tensor
    head: Head


def load_weights(
    checkpoint: Checkpoint,
    prepare: Prepare,
    device: torch.device,
    dtype: torch.dtype,
    prepare_grouped: PrepareGrouped | None = None,
) -> DecoderWeights:
    """Read tensor by tensor: besides the model on the device, the host holds one block at a time.

    `prepare_grouped`: for models with experts.
    """
    spec = checkpoint.spec
    layers = [
        load_layer(checkpoint, layer, prepare, device, dtype, prepare_grouped) for layer in range(spec.num_layers)
    ]
    embedding = load_embedding(checkpoint, dtype).to(device)
    if LM_HEAD in checkpoint.schemes():
        head = Head(checkpoint.weight(LM_HEAD), prepare, device, dtype)
    else:
        head = Head(QuantizedWeight.dense(embedding), prepare, device, dtype)
    return DecoderWeights(embedding, layers, load_final_norm(checkpoint).to(device), head)


def load_layer(
    checkpoint: Checkpoint,
    layer: int,
    prepare: Prepare,
    device: torch.device,
    dtype: torch.dtype,
    prepare_grouped: PrepareGrouped | None = None,
) -> LayerWeights:
    """One block, checked against the spec as every runner does."""
    experts, router = checkpoint.spec.experts, load_router(checkpoint, layer)
    prefix = f"{checkpoint.spec.block_prefix(layer)}."
    found: dict[str, Part] = {}

    def keep(module: str, weight: QuantizedWeight, bias: Tensor | None) -> _NotCalled:
        found[module.removeprefix(prefix)] = Part(weight, bias)
        return _NotCalled()

    norms = {name: gain.to(device) for name, gain in load_block(checkpoint, layer, make_linear=keep).norms.items()}

    def joint(*names: str) -> Linear:
        return joint_linear([found.pop(name) for name in names], prepare, device, dtype)

    if router is None:
        mlp: MlpWeights | Experts = MlpWeights(joint(GATE, UP), joint(DOWN))
    else:
        assert experts is not None and prepare_grouped is not None
        mlp = make_experts(experts, router.dequantize(), found, prepare_grouped, device, dtype, prefix.rstrip("."))
    return LayerWeights(
        qkv=joint(Q, K, V),
        o=joint(O),
        mlp=mlp,
        input_norm=norms[INPUT_NORM],
        post_attention_norm=norms[POST_ATTENTION_NORM],
        q_norm=norms.get(Q_NORM),
        k_norm=norms.get(K_NORM),
    )


class _NotCalled:
    """Stands in a DecoderBlock for a layer that runs elsewhere."""

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("this block only carries norms")
