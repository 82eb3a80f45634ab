"""The numbers of an additive weight while they are sought, and the error that counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.reference.matmul import linear


@dataclass
class Additive:
    """W[n, j] = scales[n] * sum over m of books[m, codes[n, j, m]].

    codes int64 [N, G, M], books float32 [M, E, g], scales float32 [N].
    """

    codes: Tensor
    books: Tensor
    scales: Tensor

    def sums(self) -> Tensor:
        """Without the scales: [N, G, g]."""
        total = self.books[0][self.codes[..., 0]]
        for book in range(1, self.books.shape[0]):
            total += self.books[book][self.codes[..., book]]
        return total

    def weight(self) -> Tensor:
        """[N, K]."""
        return (self.sums() * self.scales[:, None, None]).flatten(1)


def output_error(error: Tensor, moment: Tensor) -> float:
    """tr(E H E^T) for E [N, K] and H [K, K]."""
    return float((linear(error, moment) * error).sum(dtype=torch.float64))


def sum_by_code(values: Tensor, codes: Tensor, num_entries: int) -> Tensor:
    """Of values [P, g], the sum of those with each code: [E, g]. In a fixed order, on any device."""
    order = torch.argsort(codes, stable=True)
    lengths = torch.bincount(codes, minlength=num_entries)
    return torch.segment_reduce(values[order], "sum", lengths=lengths, axis=0, initial=0.0)
