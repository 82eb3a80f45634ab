"""Codes for given codebooks: a beam search for each group of columns, of all rows at once.

With the other groups of a row fixed, the error of the output as a function of one group's vector v is
|(t - v) L|^2 and a constant: L the Cholesky factor of the group's block of H = E[x x^T], t the vector that would make
up for what the other groups leave. The first sweep chooses each group as GPTQ rounds a column: the groups behind it are
free to make up for its error, L comes from the factor of H's inverse, and each error moves what is still to be chosen.
Later sweeps go over all groups again, and keep a row's new codes only where they are better.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.aqlm.state import Additive
from aphroquant.kernels.reference.matmul import linear

_BLOCK_COLUMNS = 128  # whose changes are seen at once by each other, and by the rest together
_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 28}  # of candidates' costs at once


class GroupMetric(NamedTuple):
    """Of every group's diagonal block of H [G, g, g]: itself, its Cholesky factor, its inverse."""

    block: Tensor
    factor: Tensor
    inverse: Tensor


def group_metric(moment: Tensor, in_group: int) -> GroupMetric:
    groups = moment.shape[0] // in_group
    blocks = moment.view(groups, in_group, groups, in_group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    factor = torch.linalg.cholesky(blocks)
    return GroupMetric(blocks.float(), factor.float(), torch.cholesky_inverse(factor).float())


class Candidates(NamedTuple):
    """Codes int64 [n, M] and their costs [n]."""

    codes: Tensor
    costs: Tensor


def first_codes(weight: Tensor, state: Additive, moment: Tensor, beam: int) -> Tensor:
    """Codes [N, G, M] with error feedback, groups with large inputs first. `state.codes` are not looked at."""
    in_group = state.books.shape[2]
    groups = weight.shape[1] // in_group
    order = moment.diagonal().view(groups, in_group).sum(1).argsort(descending=True, stable=True)
    columns = (order[:, None] * in_group + torch.arange(in_group, device=order.device)).flatten()
    upper = _inverse_factor(moment[columns][:, columns])
    blocks = upper.view(groups, in_group, groups, in_group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverses = torch.linalg.solve_triangular(blocks, torch.eye(in_group, device=upper.device), upper=True)
    left = (weight / state.scales[:, None])[:, columns]  # what is still to be represented, in the order of choice
    codes = torch.empty(weight.shape[0], groups, state.books.shape[0], dtype=torch.int64, device=weight.device)
    for start in range(0, weight.shape[1], _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, weight.shape[1])
        errors = torch.empty(weight.shape[0], end - start, device=weight.device)
        for first in range(start, end, in_group):
            own = slice(first, first + in_group)
            inverse = inverses[first // in_group]
            chosen = search(left[:, own], inverse, state.books, beam).codes
            codes[:, order[first // in_group]] = chosen
            scaled = (left[:, own] - _sum(state.books, chosen)) @ inverse
            errors[:, first - start : first - start + in_group] = scaled
            left[:, own.stop : end] -= scaled @ upper[own, own.stop : end]
        if end < weight.shape[1]:
            left[:, end:] -= errors @ upper[start:end, end:]
    return codes


def improve_codes(weight: Tensor, state: Additive, moment: Tensor, metric: GroupMetric, beam: int) -> float:
    """One sweep over all groups, in place. The share of the codes that changed."""
    in_group = state.books.shape[2]
    error = weight - state.weight()
    scales = state.scales[:, None]
    changed = torch.zeros((), dtype=torch.int64, device=weight.device)  # read once: a GPU need not be waited for
    for start in range(0, weight.shape[1], _BLOCK_COLUMNS):
        end = min(start + _BLOCK_COLUMNS, weight.shape[1])
        pull = linear(error, moment[start:end])  # E H, of this block's columns
        for first in range(start, end, in_group):
            group, own = first // in_group, slice(first, first + in_group)
            block, factor, inverse = (part[group] for part in metric)
            others = pull[:, first - start : first - start + in_group] - error[:, own] @ block
            target = (weight[:, own] + others @ inverse) / scales
            found = search(target, factor, state.books, beam, state.codes[:, group])
            moved = (found.codes != state.codes[:, group]).any(1)
            changed += moved.sum()
            state.codes[:, group] = found.codes
            new = weight[:, own] - scales * _sum(state.books, found.codes)
            change = new - error[:, own]
            error[:, own] = new
            pull += change @ moment[own, start:end]
    return int(changed) / max(1, state.codes[..., 0].numel())


def search(target: Tensor, factor: Tensor, books: Tensor, beam: int, current: Tensor | None = None) -> Candidates:
    """For each row of target [N, g], codes whose entries' sum v has a small |(target - v) factor|^2.

    Never worse than `current` [N, M], where given.
    """
    near, entries = target @ factor, books @ factor  # [N, g], [M, E, g]
    rows = max(1, _ELEMENTS[target.device.type] // (beam * books.shape[1]))
    parts = [
        _search_rows(
            near[start : start + rows], entries, beam, None if current is None else current[start : start + rows]
        )
        for start in range(0, target.shape[0], rows)
    ]
    return Candidates(torch.cat([part.codes for part in parts]), torch.cat([part.costs for part in parts]))


def _search_rows(near: Tensor, entries: Tensor, beam: int, current: Tensor | None) -> Candidates:
    found = _exchange(near, entries, _beam_search(near, entries, beam))
    if current is None:
        return found
    kept = _exchange(near, entries, current)
    better = found.costs < kept.costs
    return Candidates(torch.where(better[:, None], found.codes, kept.codes), torch.minimum(found.costs, kept.costs))


def _beam_search(near: Tensor, entries: Tensor, beam: int) -> Tensor:
    """Book by book, the `beam` best partial sums of each row go on: codes [n, M] of the best in the end."""
    left = near[:, None]  # [n, beams, g]
    codes = torch.empty(near.shape[0], 1, 0, dtype=torch.int64, device=near.device)
    rows = torch.arange(near.shape[0], device=near.device)[:, None]
    for own in entries[:-1]:
        costs = _costs(left, own) + left.square().sum(2, keepdim=True)
        best = costs.flatten(1).topk(min(beam, costs[0].numel()), largest=False).indices
        parent, code = best // own.shape[0], best % own.shape[0]
        left = left[rows, parent] - own[code]
        codes = torch.cat([codes[rows, parent], code[..., None]], 2)
    least = _costs(left, entries[-1]).min(2)  # [n, beams]
    chosen = (least.values + left.square().sum(2)).argmin(1, keepdim=True)
    return torch.cat([codes[rows, chosen], least.indices.gather(1, chosen)[..., None]], 2)[:, 0]


def _costs(left: Tensor, entries: Tensor) -> Tensor:
    """|left - entry|^2 of left [n, b, g] without |left|^2: [n, b, E]."""
    flat = torch.addmm(entries.square().sum(1), left.flatten(0, 1), entries.T, alpha=-2)
    return flat.view(*left.shape[:2], -1)


def _exchange(near: Tensor, entries: Tensor, codes: Tensor) -> Candidates:
    """Each book's code in turn for the best one beside the others; with one book there is nothing to exchange."""
    codes = codes.clone()
    left = near - _sum(entries, codes)
    if entries.shape[0] > 1:
        for book, own in enumerate(entries):
            left = left + own[codes[:, book]]
            codes[:, book] = _costs(left[:, None], own)[:, 0].argmin(1)
            left = left - own[codes[:, book]]
    return Candidates(codes, left.square().sum(1))


def _sum(books: Tensor, codes: Tensor) -> Tensor:
    """[N, g] of codes [N, M]."""
    total = books[0][codes[:, 0]]
    for book in range(1, books.shape[0]):
        total = total + books[book][codes[:, book]]
    return total


def _inverse_factor(moment: Tensor) -> Tensor:
    """U float32, upper triangular, with U^T U = H^-1."""
    lower = torch.linalg.cholesky(moment.double())
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.float()
