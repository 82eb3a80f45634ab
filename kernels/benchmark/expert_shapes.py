"""The expert layers of well-known mixture-of-experts models, as an engine runs them: gate and up in one product."""

from __future__ import annotations

from typing import NamedTuple


class ExpertShape(NamedTuple):
    """A weight [out_features, in_features] for each expert; a token is multiplied by `top_k` of them.

    `by_token`: the inputs are those of tokens; else those of pairs of a token and an expert, sorted by expert.
    """

    name: str
    out_features: int
    in_features: int
    experts: int
    top_k: int
    by_token: bool


class _Experts(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int


_MODELS = {
    "qwen3-30b-a3b": _Experts(2048, 768, 128, 8),
    "qwen3-235b-a22b": _Experts(4096, 1536, 128, 8),
    "mixtral-8x7b": _Experts(4096, 14336, 8, 2),
    "gpt-oss-20b": _Experts(2880, 2880, 32, 4),
}
EXPERT_MODELS = tuple(_MODELS)


def expert_shapes(name: str) -> list[ExpertShape]:
    """Of one of EXPERT_MODELS."""
    model = _MODELS[name]
    sizes = (model.experts, model.top_k)
    return [
        ExpertShape("gate_up", 2 * model.intermediate, model.hidden, *sizes, by_token=True),
        ExpertShape("down", model.hidden, model.intermediate, *sizes, by_token=False),
    ]
