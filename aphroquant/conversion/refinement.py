"""Refining a solved block: its output on the quantized model's states, brought nearer to the source's on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aphroquant.calibration.differentiable import repeatable_training
from aphroquant.calibration.refine import Numbers, Values, refine
from aphroquant.calibration.solution import Solution, relative_error
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.calibration.training import TrainedGain
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.conversion.dataless import naming_modules
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.training import WindowForward, trained_norms, trained_weight


class Unrounded:
    """What a block's layers were before rounding: weights as scaled, and the statistics of their inputs."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.statistics: dict[str, InputStatistics | None] = {}


class BlockRefiner:
    """Refines blocks one after the other, with a number of steps each."""

    def __init__(self, plan: ConversionPlan, window_len: int, device: torch.device) -> None:
        self._plan, self._window_len, self._device = plan, window_len, device
        self._forward = WindowForward(plan.spec, window_len, device)

    def refine(
        self,
        block: CalibrationBlock,
        solutions: Mapping[str, Solution],
        unrounded: Unrounded,
        inputs: Tensor,
        targets: Tensor,
    ) -> tuple[dict[str, Solution], dict[str, Any]]:
        """Better solutions by module name, and a report. `block` gets the numbers that it goes on with.

        inputs and targets [T, H]: hidden states before the block in the quantized model, behind it in the source.
        """
        names = {name: f"{block.prefix}.{name}" for name in unrounded.weights}
        weights = {
            name: trained_weight(solutions[module].weight.to(self._device), unrounded.weights[name])
            for name, module in names.items()
        }
        gains = {
            norm: TrainedGain(block.norms[norm], self._stored_dtype(block, norm))
            for norm in trained_norms(block, self._plan.modules.__contains__)
        }

        def forward(values: Values, gains: Values, hidden: Tensor) -> Tensor:
            return self._forward.block(block, values, gains, hidden)

        def batch(windows: Sequence[int]) -> tuple[Tensor, Tensor]:
            return self._windows(inputs, windows), self._windows(targets, windows)

        request = self._plan.request
        with naming_modules(block.prefix), repeatable_training(self._device):
            num_windows = inputs.shape[0] // self._window_len
            found = refine(
                weights, gains, forward, batch, num_windows, steps=self._plan.refine_steps, seed=request.seed
            )
        report = {"loss_before": found.loss_before, "loss_after": found.loss_after}
        if found.numbers is None:
            return dict(solutions), report
        return self._taken_over(block, solutions, unrounded, found.numbers), report

    def _taken_over(
        self, block: CalibrationBlock, solutions: Mapping[str, Solution], unrounded: Unrounded, numbers: Numbers
    ) -> dict[str, Solution]:
        for norm, gain in numbers.gains.items():
            block.norms[norm] = gain.float()
            block.changed[f"{block.prefix}.{norm}.weight"] = gain
        refined = dict(solutions)
        for name, weight in numbers.weights.items():
            module = f"{block.prefix}.{name}"
            values = weight.dequantize()
            block.linears[name].weight = values
            refined[module] = replace(
                solutions[module],
                weight=weight.to(torch.device("cpu")),
                relative_error=relative_error(unrounded.weights[name], values, unrounded.statistics[name]),
                details=solutions[module].details | {"refined": True},
            )
        return refined

    def _stored_dtype(self, block: CalibrationBlock, norm: str) -> torch.dtype:
        return self._plan.checkpoint.tensors[f"{block.prefix}.{norm}.weight"].dtype

    def _windows(self, states: Tensor, windows: Sequence[int]) -> Tensor:
        index = torch.tensor(windows, device=states.device)
        chosen = states.view(-1, self._window_len, states.shape[1])[index]
        return chosen.flatten(0, 1).to(self._device)
