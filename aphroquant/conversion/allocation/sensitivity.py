"""How much each layer's rounding changes the model's output, before anything is chosen.

Near the source, the divergence of a model whose weights are off by E is half of E F E, with F the Fisher information:
the mean of (g . E)**2 over gradients g of the log-probability of tokens that the source itself would write. A window's
gradient is a sum over its tokens whose mixed terms vanish on average, so that one backward pass a window gives an
estimate of the window's whole divergence. It is taken row by row, sum over rows of (g_row . E_row)**2: errors of
different rows have nothing to do with each other, and a sum of many squares is far steadier than the square of one sum,
while what errors within a row make up for each other, which error feedback is about, still counts.

One pass forward, which also quantizes each layer with each width, and one pass back, each with one block in memory.

Measured on SmolLM2-135M in its off-grid variant: GPTQ's widths, groups of 64 with zero points, layers rounded to
nearest with searched ranges by 8 windows of 256 tokens of State of the Union addresses, 6 of which they are judged by;
KL divergence on 4 windows of 384 tokens of Wikipedia, of 3.5 stored bits as `allocate` chooses them by

    sum over rows of (g_row . E_row)**2, this one           0.780
    sum of (g E)**2 over weights                            0.778
    sum of |g E|, as AutoRound's AutoScheme                 0.890
    (g . E)**2 of the whole matrix                          0.972
    no estimate: 4 bits for the first and last layers       0.862
    no estimate: 4 bits for o and down, 3 for the others    1.052

Of 24 single groups at 3 bits the measured divergence is 0.9 to 1.7 times the first estimate (4.3 times for one); the
rank correlations are 0.983, 0.981, 0.757 and 0.802.
Uniform 3 bits (3.34 stored) have 1.291, 4 (4.36) 0.286: about 1.02 for 3.5 by the logarithm. A dozen measured choices
made 0.763 of 0.780, with factors twice as wide as `calibration/allocation.py` now begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from aphroquant.calibration.differentiable import linear, repeatable_training
from aphroquant.calibration.distill import logit_rows
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, default_memory_limit
from aphroquant.conversion.allocation.pieces import PieceStore, pieces_of
from aphroquant.conversion.allocation.problem import Problem
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.dataless import naming_modules
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.source_pass import SourcePass, embedded
from aphroquant.conversion.training import WindowForward
from aphroquant.models.decoder import Linear, rms_norm
from aphroquant.models.loader import load_final_norm, load_head, load_router

Damages = dict[tuple[str, int], float]  # of a module with the width at that place


class Sensitivity:
    """The passes over one source. `pieces` is filled on the way forward."""

    def __init__(
        self, problem: Problem, checkpoint: Checkpoint, pieces: PieceStore, device: torch.device, progress: Progress
    ) -> None:
        self._problem, self._checkpoint, self._pieces = problem, checkpoint, pieces
        self._device, self._progress = device, progress
        self._places = {module: item.widths for item in problem.items for module in item.modules}

    def damages(self, windows: Tensor, num_judged: int, seed: int, *, quick: bool) -> Damages:
        """Estimated divergences, per token, of each module with each of its widths, on its own.

        Layers are rounded by the inputs that all windows [B, S] give them, and judged by the first `num_judged`."""
        states = self._forward(windows, num_judged, quick=quick)
        judged = windows[:num_judged]
        gradients = self._output_gradients(states.pop().rows, judged.shape[1], seed)
        found = self._backward(states, gradients, judged.shape[1])
        return {key: value / judged.numel() / 2 for key, value in found.items()}

    @torch.no_grad()
    def _forward(self, windows: Tensor, num_judged: int, *, quick: bool) -> list[Activations]:
        """The states of the windows that are judged in front of each block, and behind the last."""
        num_layers, window_len = self._checkpoint.spec.num_layers, windows.shape[1]
        limit = default_memory_limit(num_layers + 3)
        hidden = embedded(self._checkpoint, windows, memory_limit=limit, device=self._device)
        source = SourcePass(
            hidden,
            window_len,
            observes=True,
            second_moments=not quick,
            memory_limit=limit,
            device=self._device,
        )
        states = []
        for layer in range(num_layers):
            states.append(self._first(hidden, num_judged * window_len, limit))
            block = load_calibration_block(self._checkpoint, layer, window_len, self._device)
            source.step(block)
            self._quantize(block, source, quick=quick)
            self._progress.block(layer + 1, num_layers)
        return [*states, self._first(hidden, num_judged * window_len, limit)]

    def _first(self, hidden: Activations, num_tokens: int, limit: int) -> Activations:
        kept = Activations(num_tokens, hidden.rows.shape[1], memory_limit=limit)
        kept.rows.copy_(hidden.rows[:num_tokens])
        return kept

    def _quantize(self, block: CalibrationBlock, source: SourcePass, *, quick: bool) -> None:
        for modules in _sharing_inputs(source.statistics):
            statistics = source.statistics[modules[0]]
            for place, width in enumerate(self._problem.widths):
                weights = {
                    module: block.linears[module.removeprefix(f"{block.prefix}.")].weight
                    for module in modules
                    if place in self._places.get(module, ())
                }
                with naming_modules(", ".join(weights)):
                    found = pieces_of(width, weights, statistics, quick=quick)
                for module, piece in found.items():
                    self._pieces.put(module, place, piece)

    def _output_gradients(self, states: Tensor, window_len: int, seed: int) -> Tensor:
        """By the states behind the last block, of the log-probability of tokens drawn from the source's own."""
        spec = self._checkpoint.spec
        head, gain = (load(self._checkpoint).to(self._device) for load in (load_head, load_final_norm))
        drawing = torch.Generator().manual_seed(seed)
        gradients = torch.empty_like(states)
        for rows in logit_rows(states.shape[0], spec.vocab_size):
            hidden = states[rows].to(self._device).requires_grad_()
            with torch.enable_grad():
                normed = rms_norm(hidden, gain, spec.norm_eps)
            shares = linear(normed.detach(), head).softmax(-1)  # [T, V]
            tokens = _drawn(shares, drawing)
            shares[torch.arange(len(tokens), device=self._device), tokens] -= 1
            normed.backward(shares @ head)  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradients[rows] = hidden.grad.to(gradients.device)
        return gradients

    def _backward(self, states: list[Activations], gradients: Tensor, window_len: int) -> Damages:
        forward = WindowForward(self._checkpoint.spec, window_len, self._device)
        found: Damages = dict.fromkeys(
            ((module, place) for module, places in self._places.items() for place in places), 0.0
        )
        total = self._checkpoint.spec.num_layers
        with repeatable_training(self._device):
            for layer in reversed(range(total)):
                block = load_calibration_block(self._checkpoint, layer, window_len, self._device)
                inputs = states.pop().rows
                for start in range(0, inputs.shape[0], window_len):
                    rows = slice(start, start + window_len)
                    self._one_window(block, forward, inputs[rows], gradients[rows], found)
                self._progress.block(total - layer, total)
        return found

    def _one_window(
        self, block: CalibrationBlock, forward: WindowForward, inputs: Tensor, gradient: Tensor, found: Damages
    ) -> None:
        """Add a window's estimates, and replace its gradient by that in front of the block."""
        hidden = inputs.to(self._device).requires_grad_()
        modules = {name: f"{block.prefix}.{name}" for name in block.linears}
        weights = {
            name: own.weight.detach().requires_grad_(modules[name] in self._places)
            for name, own in block.linears.items()
        }
        with torch.enable_grad():
            output = forward.block(block, weights, {}, hidden, self._router(block))
            output.backward(gradient.to(self._device))  # type: ignore[no-untyped-call]
        for name, weight in weights.items():
            if weight.grad is None:  # not to be chosen for, or an expert without a token
                continue
            for place in self._places[modules[name]]:
                rounded = self._pieces.get(modules[name], place).to(self._device).dequantize()
                change = (weight.grad * (rounded - weight.detach())).sum(1)  # [N]
                found[modules[name], place] += float(change.square().sum())
        assert hidden.grad is not None
        gradient.copy_(hidden.grad)

    def _router(self, block: CalibrationBlock) -> Linear | None:
        """One that gradients pass through."""
        weight = load_router(self._checkpoint, block.block.layer)
        return None if weight is None else partial(linear, weight=weight.dequantize().to(self._device))


def item_damages(problem: Problem, damages: Damages) -> list[list[float]]:
    """Of each item with each of its widths: those of its modules together."""
    return [[sum(damages[module, place] for module in item.modules) for place in item.widths] for item in problem.items]


def guessed_damages(problem: Problem) -> list[list[float]]:
    """Without a look at any number: each bit less quadruples the square of an error, all layers being alike."""
    found = []
    for item in problem.items:
        costs: Sequence[int] = problem.costs(item)
        shapes = [problem.widths[0].plan.modules[module] for module in item.modules]
        weights = sum(rows * columns for rows, columns in shapes)
        found.append([weights * 4.0 ** (-8 * cost / weights) for cost in costs])
    return found


def _sharing_inputs(statistics: Mapping[str, InputStatistics]) -> list[list[str]]:
    """The modules that have the very same statistics, together."""
    found: dict[int, list[str]] = {}
    for module, own in statistics.items():
        found.setdefault(id(own), []).append(module)
    return list(found.values())


def _drawn(shares: Tensor, drawing: torch.Generator) -> Tensor:
    """One place for each row of shares [T, V], the same on every device."""
    points = torch.rand(shares.shape[0], 1, generator=drawing).to(shares.device)
    sums = shares.cumsum(-1)
    return torch.searchsorted(sums, points * sums[:, -1:]).squeeze(1).clamp(max=shares.shape[1] - 1)
