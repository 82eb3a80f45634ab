"""What models' logits say of each position: divergence, agreement, probability of the token that followed.

Logits are float32; differences, exponentials and sums are float64, so that a divergence of 1e-7 is still a number and
not rounding. With d = base - model, each shifted by its largest logit, and Z the sums of the exponentials,

    KL(base || model) = sum(exp(base) d) / Z_base - (ln Z_base - ln Z_model)

which takes one exponential a logit and model, and the base's only once for all models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS = 1 << 20  # of a float64 matrix of logits at once: what stays in the cache, four times as fast as 2**23


class Positions(NamedTuple):
    """One entry a scored position, all [T]. Where the model's logits are not finite: kld inf, logprob -inf, no match.

    `confidence` is the base's largest probability; the logprobs are of the token that follows in the text.
    """

    kld: Tensor  # float64, KL(base || model) in nats
    base_logprob: Tensor  # float64
    model_logprob: Tensor  # float64
    confidence: Tensor  # float64
    entropy: Tensor  # float64, of the base, in nats
    same_top1: Tensor  # bool
    base_finite: Tensor  # bool
    model_finite: Tensor  # bool

    @classmethod
    def concatenate(cls, parts: Sequence[Positions]) -> Positions:
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def select(self, chosen: slice) -> Positions:
        """The positions of a slice."""
        return Positions(*(column[chosen] for column in self))

    def cpu(self) -> Positions:
        return Positions(*(column.cpu() for column in self))


class _Base(NamedTuple):
    """What is computed once for all models: logits less the largest, their exponentials, the sum of those."""

    shifted: Tensor  # [T, V]
    exponentials: Tensor  # [T, V]
    total: Tensor  # [T]
    top1: Tensor  # [T]
    finite: Tensor  # [T]


def compare_logits(base: Tensor, model: Tensor, targets: Tensor) -> Positions:
    """Compare logits [T, V] of the base and the model; `targets` [T] are the tokens that follow."""
    return compare_several(base, [model], targets)[0]


def compare_several(base: Tensor, models: Sequence[Tensor], targets: Tensor) -> list[Positions]:
    """The same for several models, one result each."""
    rows = max(1, ELEMENTS // base.shape[1])
    parts: list[list[Positions]] = [[] for _ in models]
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        reference = _reference(base[chunk])
        for found, model in zip(parts, models, strict=True):
            found.append(_compare(reference, model[chunk], targets[chunk]))
    return [Positions.concatenate(found) for found in parts]


def _reference(logits: Tensor) -> _Base:
    shifted, finite, top1 = _shifted(logits)
    exponentials = shifted.exp()
    return _Base(shifted, exponentials, exponentials.sum(-1), top1, finite)


def _shifted(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float64 less their row's largest; whether all of a row are finite; the place of the largest."""
    wide = logits.double()
    finite = wide.sum(-1).isfinite()  # float32 numbers cannot sum up to more than float64 holds
    largest, top1 = logits.max(-1)
    return wide.sub_(largest.double()[:, None]), finite, top1


def _compare(base: _Base, logits: Tensor, targets: Tensor) -> Positions:
    shifted, finite, top1 = _shifted(logits)
    target_logit = shifted.gather(1, targets[:, None])[:, 0]
    difference = base.shifted - shifted
    total = shifted.exp_().sum(-1)
    log_base, log_model = base.total.log(), total.log()
    kld = torch.linalg.vecdot(base.exponentials, difference) / base.total - (log_base - log_model)
    entropy = log_base - torch.linalg.vecdot(base.exponentials, base.shifted) / base.total
    return Positions(
        kld=kld.clamp_(min=0).masked_fill(~finite, torch.inf),  # the difference may round to -1e-16
        base_logprob=base.shifted.gather(1, targets[:, None])[:, 0] - log_base,
        model_logprob=(target_logit - log_model).masked_fill(~finite, -torch.inf),
        confidence=1 / base.total,
        entropy=entropy.clamp_(min=0),
        same_top1=(base.top1 == top1) & finite,
        base_finite=base.finite,
        model_finite=finite,
    )
