"""An additive weight as numbers that gradient steps move: codebooks and scales by Adam, and a few codes a step.

As in PV-Tuning (arXiv 2405.14852) a step changes the codes of at most one group in a hundred, those with the most to
gain, because many small changes of single groups could not be told from none. With the mean gradient g of a group, and
the curvature h of its numbers, a change d of the group changes the loss by g d + h d^2 / 2: the new codes are those
nearest to the group's minimum, w - g / h, weighted by h. No gradient passes through a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.weighted import nearest_codes, summed
from aphroquant.calibration.training import Adam, Curvature
from aphroquant.schemes import AdditiveScheme, QuantizedWeight

_MOMENTUM = 0.9  # of the gradients that codes are chosen by
_CHANGED_SHARE = 0.01  # of the groups, at most, in a step
_BEAM = 4
_ELEMENTS = 1 << 26  # of costs at once, which bounds the groups as well
_SMALLEST = 1e-30


class TrainedAdditive:
    """The numbers of a weight [N, K] whose scheme is an AdditiveScheme with out_group 1.

    Scales move as factors of what they were, entries by shares of their codebook's size, so that one step size fits
    both.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        assert isinstance(weight.scheme, AdditiveScheme)
        self.scheme, self.shape, self._codes = weight.scheme, weight.shape, weight["codes"]
        self._dtypes = weight["codebooks"].dtype, weight["scales"].dtype, weight["codes"].dtype
        self._first_scales, self._first_books = weight["scales"].float(), weight["codebooks"].squeeze(2).float()
        self._factors, self._moves = torch.zeros_like(self._first_scales), torch.zeros_like(self._first_books)
        self._size = self._first_books.square().mean((1, 2), keepdim=True).sqrt()  # [M, 1, 1]
        self._adams = Adam(self._factors), Adam(self._moves)
        self._mean: Tensor | None = None  # of the gradients, once codes are moved
        groups = self._codes[..., 0].numel()
        self._orders = self._codes.new_empty(self.scheme.num_codebooks, groups, dtype=torch.int64)
        self._counts = self._codes.new_empty(self._moves.shape[:2], dtype=torch.int64)
        self._sort()

    def value(self) -> Tensor:
        """The weight [N, K] as it is now, float32, a leaf to differentiate by."""
        return (self._sums() * self._scales()[:, None, None]).flatten(1).requires_grad_()

    @torch.no_grad()
    def step(self, gradient: Tensor, size: Tensor) -> None:
        """One step of scales and entries, of this relative size, against the gradient [N, K] by `value()`."""
        scales = self._scales()
        groups = gradient.view(gradient.shape[0], -1, self.scheme.in_group)
        by_scale = (groups * self._sums()).sum((1, 2))
        scaled = (groups * scales[:, None, None]).flatten(0, 1)
        by_book = torch.stack(
            [
                torch.segment_reduce(scaled[order], "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)
                for order, counts in zip(self._orders, self._counts, strict=True)
            ]
        )
        self._factors -= self._adams[0].step(by_scale * scales, size)
        self._moves -= self._adams[1].step(by_book * self._size, size)

    @torch.no_grad()
    def step_codes(self, gradient: Tensor, curvature: Curvature, size: Tensor) -> None:
        """Other codes for at most a share `size` of the groups, by the gradients [N, K] so far."""
        if self._mean is None:
            self._mean, self._codes = torch.zeros_like(gradient), self._codes.to(torch.int32, copy=True)
        self._mean.lerp_(gradient, 1 - _MOMENTUM)
        in_group, books = self.scheme.in_group, self._books()
        mean = self._mean.view(-1, in_group)  # [N * G, g], as below
        bend = (curvature.rows[:, None] * curvature.columns).view(-1, in_group)
        gain = (mean.square() / bend.clamp(min=_SMALLEST)).sum(1)
        chosen = gain.topk(self._most_changed(len(gain), books)).indices
        scales = self._scales().repeat_interleave(len(gain) // self.shape[0])[chosen, None]
        codes = self._codes.flatten(0, 1)
        before, bend = codes[chosen].long(), bend[chosen].clamp(min=_SMALLEST)
        now = summed(books, before)
        found = nearest_codes(now - mean[chosen] / (bend * scales), bend * scales.square(), books, before, _BEAM)
        allowed = torch.arange(len(chosen), device=gain.device) < size * len(gain)
        found = torch.where(allowed[:, None], found, before)
        codes[chosen] = found.to(codes.dtype)
        mean[chosen] += bend * scales * (summed(books, found) - now)
        self._sort()

    def rounded(self) -> QuantizedWeight:
        """The weight that would be stored."""
        books, scales = self._books().to(self._dtypes[0]), self._scales().to(self._dtypes[1])
        tensors = {
            "codes": self._codes.to(self._dtypes[2], copy=self._mean is not None),
            "codebooks": torch.where(books.isfinite(), books, self._first_books.to(books.dtype))[:, :, None],
            "scales": torch.where(scales.isfinite(), scales, self._first_scales.to(scales.dtype)),
        }
        return QuantizedWeight(self.scheme, tensors, self.shape)

    def moved(self) -> dict[str, Tensor]:
        """What `rounded` depends on and steps move: the tensors themselves, to be filled in place."""
        return {"factors": self._factors, "moves": self._moves}

    def momenta(self) -> dict[str, Tensor]:
        """What else further steps depend on, likewise."""
        scales, books = self._adams
        return scales.state() | {f"books.{name}": tensor for name, tensor in books.state().items()}

    def _sort(self) -> None:
        """The groups [M, N * G] in the order of their codes, and how many have each, in place: a replay reads there."""
        flat = self._codes.flatten(0, 1).T.long()
        self._orders.copy_(flat.argsort(dim=1, stable=True))
        self._counts.zero_().scatter_add_(1, flat, torch.ones_like(flat))

    def _most_changed(self, num_groups: int, books: Tensor) -> int:
        beam = _BEAM if books.shape[0] > 1 else 1
        return max(1, min(int(num_groups * _CHANGED_SHARE), _ELEMENTS // (beam * books.shape[1])))

    def _books(self) -> Tensor:
        return self._first_books + self._size * self._moves

    def _scales(self) -> Tensor:
        return self._first_scales * self._factors.exp()

    def _sums(self) -> Tensor:
        books = self._books()
        total = books[0][self._codes[..., 0].int()]
        for book in range(1, self.scheme.num_codebooks):
            total = total + books[book][self._codes[..., book].int()]
        return total
