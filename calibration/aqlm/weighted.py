"""Codes of single groups, each number of each with a weight of its own: what steps on codes choose by."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_codes(target: Tensor, weights: Tensor, books: Tensor, current: Tensor, beam: int) -> Tensor:
    """Codes int64 [k, M] whose entries' sum v [k, g] has a small sum of weights * (target - v)**2, by beam search.

    target, weights [k, g], books [M, E, g]. Never worse than `current` [k, M]; nothing is decided by values outside of
    the device, so that the work can be recorded.
    """
    left = target[:, None]  # [k, beams, g]
    codes = torch.empty(target.shape[0], 1, 0, dtype=torch.int64, device=target.device)
    rows = torch.arange(target.shape[0], device=target.device)[:, None]
    for own in books:
        costs = _costs(left, weights, own)  # [k, beams, E]
        best = costs.flatten(1).topk(min(beam, costs[0].numel()), largest=False).indices
        parent, code = best // own.shape[0], best % own.shape[0]
        left = left[rows, parent] - own[code]
        codes = torch.cat([codes[rows, parent], code[..., None]], 2)
    found = _exchanged(target, weights, books, codes[:, 0])
    better = _cost(target, weights, books, found) < _cost(target, weights, books, current)
    return torch.where(better[:, None], found, current)


def summed(books: Tensor, codes: Tensor) -> Tensor:
    """The entries' sums [k, g] of codes [k, M]."""
    total = books[0][codes[:, 0]]
    for book in range(1, books.shape[0]):
        total = total + books[book][codes[:, book]]
    return total


def _exchanged(target: Tensor, weights: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    """Each book's code in turn for the best one beside the others."""
    if books.shape[0] == 1:
        return codes
    codes, left = codes.clone(), target - summed(books, codes)
    for book, own in enumerate(books):
        left = left + own[codes[:, book]]
        codes[:, book] = _costs(left[:, None], weights, own)[:, 0].argmin(1)
        left = left - own[codes[:, book]]
    return codes


def _costs(left: Tensor, weights: Tensor, entries: Tensor) -> Tensor:
    """Of left [k, b, g] by every entry [E, g]: [k, b, E]."""
    products = (left * weights[:, None]) @ entries.T
    own = (left.square() * weights[:, None]).sum(2, keepdim=True)
    return (weights @ entries.square().T)[:, None] + own - 2 * products


def _cost(target: Tensor, weights: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    return ((target - summed(books, codes)).square() * weights).sum(1)
