"""The positions of greatest divergence in their context: what the base expected there, and what the candidate does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aphroquant.evaluation.positions import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_WORST = 20
TOP = 5
_BEFORE, _AFTER = 32, 8  # tokens of context


@dataclass(frozen=True)
class TokenProbability:
    """A token as text, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class WorstToken:
    """One position: the text before it, the token that followed there, the text after, and both models' guesses.

    `window` counts from 0 over all texts, `position` in the window; the token at `position` + 1 is `token`.
    """

    window: int
    position: int
    kld: float
    before: str
    token: str
    after: str
    base_probability: float  # of `token`
    model_probability: float
    base_top: tuple[TokenProbability, ...]
    model_top: tuple[TokenProbability, ...]


class WorstRows(NamedTuple):
    """Rows of the worst positions, with the logits [rows, V] of both models there."""

    rows: Tensor
    base_logits: Tensor
    model_logits: Tensor


def worst_rows(positions: Positions, count: int = NUM_WORST) -> Tensor:
    """The rows of greatest divergence, the worst first; those that are not finite before all."""
    return positions.kld.sort(descending=True, stable=True).indices[:count]


def describe_worst(
    worst: WorstRows, positions: Positions, batch: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[WorstToken, ...]:
    """The worst positions of token windows `batch` [W, S] in words."""
    logits = zip(worst.base_logits, worst.model_logits, strict=True)
    return tuple(
        _describe(row, positions, batch, tokenizer, base, model)
        for row, (base, model) in zip(worst.rows.tolist(), logits, strict=True)
    )


def _describe(
    row: int, positions: Positions, batch: Tensor, tokenizer: PreTrainedTokenizerBase, base: Tensor, model: Tensor
) -> WorstToken:
    window, position = divmod(row, batch.shape[1] - 1)
    tokens, following = batch[window].tolist(), position + 1
    return WorstToken(
        window=window,
        position=position,
        kld=float(positions.kld[row]),
        before=_text(tokenizer, tokens[max(0, following - _BEFORE) : following]),
        token=_text(tokenizer, [tokens[following]]),
        after=_text(tokenizer, tokens[following + 1 : following + 1 + _AFTER]),
        base_probability=float(positions.base_logprob[row].exp()),
        model_probability=float(positions.model_logprob[row].exp()),
        base_top=_top(tokenizer, base),
        model_top=_top(tokenizer, model),
    )


def _top(tokenizer: PreTrainedTokenizerBase, logits: Tensor) -> tuple[TokenProbability, ...]:
    if not bool(logits.isfinite().all()):
        return ()
    top = torch.softmax(logits.double(), -1).topk(min(TOP, len(logits)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(TokenProbability(_text(tokenizer, [token]), probability) for token, probability in pairs)


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
