"""Codebooks and scales of an additive weight as numbers that gradient steps move. Codes stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.calibration.training import Adam, Curvature
from aphroquant.schemes import AdditiveScheme, QuantizedWeight


class TrainedAdditive:
    """The numbers of a weight [N, K] whose scheme is an AdditiveScheme with out_group 1.

    Scales move as factors of what they were, entries by shares of their codebook's size, so that one step size fits
    both.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        assert isinstance(weight.scheme, AdditiveScheme)
        self.scheme, self.shape, self._codes = weight.scheme, weight.shape, weight["codes"]
        self._dtypes = weight["codebooks"].dtype, weight["scales"].dtype
        self._first_scales, self._first_books = weight["scales"].float(), weight["codebooks"].squeeze(2).float()
        self._factors, self._moves = torch.zeros_like(self._first_scales), torch.zeros_like(self._first_books)
        self._size = self._first_books.square().mean((1, 2), keepdim=True).sqrt()  # [M, 1, 1]
        self._adams = Adam(self._factors), Adam(self._moves)
        flat = self._codes.flatten(0, 1).T.long()  # [M, N * G]
        self._orders = [codes.argsort(stable=True) for codes in flat]
        self._counts = [codes.bincount(minlength=self._moves.shape[1]) for codes in flat]

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

    def step_codes(self, gradient: Tensor, curvature: Curvature, size: Tensor) -> None:
        """Nothing: codes are chosen by beam search."""

    def rounded(self) -> QuantizedWeight:
        """The weight that would be stored."""
        books, scales = self._books().to(self._dtypes[0]), self._scales().to(self._dtypes[1])
        tensors = {
            "codes": self._codes,
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
