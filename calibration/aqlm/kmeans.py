"""First codebooks: k-means of the groups, then of what it leaves, book by book, with an importance for each number."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.state import sum_by_code

_ITERATIONS = 25
_MIN_GAIN = 1e-3  # relative, of an iteration
_POINTS_PER_ENTRY = 64  # more points of a layer change the codebook little
_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # of distances at once


def residual_kmeans(
    points: Tensor, importance: Tensor, num_books: int, num_entries: int, generator: torch.Generator
) -> Tensor:
    """Books [M, E, g] whose sums are near the points [P, g]; an error costs importance [P, g] times its square."""
    most = num_entries * _POINTS_PER_ENTRY
    if points.shape[0] > most:
        chosen = torch.randperm(points.shape[0], generator=generator)[:most].to(points.device)
        points, importance = points[chosen], importance[chosen]
    books, left = [], points
    for _ in range(num_books):
        book = kmeans(left, importance, num_entries, generator)
        left = left - book[nearest(left, importance, book)[0]]
        books.append(book)
    return torch.stack(books)


def kmeans(points: Tensor, importance: Tensor, num_entries: int, generator: torch.Generator) -> Tensor:
    """Entries [E, g]. Those that nothing is near to move to the points with the largest errors."""
    picked = torch.randint(points.shape[0], (num_entries,), generator=generator).to(points.device)
    if points.shape[0] >= num_entries:
        picked = torch.randperm(points.shape[0], generator=generator)[:num_entries].to(points.device)
    entries, before = points[picked].clone(), torch.inf
    for _ in range(_ITERATIONS):
        codes, errors = nearest(points, importance, entries)
        total = float(errors.sum(dtype=torch.float64))
        weights = sum_by_code(importance, codes, num_entries)
        means = sum_by_code(points * importance, codes, num_entries) / weights.clamp(min=1e-30)
        entries = torch.where(weights > 0, means, entries)
        empty = (weights.sum(1) == 0).nonzero()[:, 0]
        if empty.numel():
            worst = errors.topk(min(empty.numel(), errors.numel())).indices
            entries[empty[: worst.numel()]] = points[worst]
        elif total > before * (1 - _MIN_GAIN):
            break
        before = total
    return entries


def nearest(points: Tensor, importance: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of the least weighted distance for each point, and that distance: int64 [P] and [P]."""
    codes = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
    errors = torch.empty(points.shape[0], device=points.device)
    step = max(1, _ELEMENTS[points.device.type] // entries.shape[0])
    squares = entries.square().T
    for start in range(0, points.shape[0], step):
        part = slice(start, start + step)
        weighted = points[part] * importance[part]
        costs = importance[part] @ squares
        costs.addmm_(weighted, entries.T, alpha=-2)
        least = costs.min(1)
        codes[part] = least.indices
        errors[part] = (least.values + (weighted * points[part]).sum(1)).clamp(min=0)
    return codes, errors
