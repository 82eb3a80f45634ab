"""Distilling a solved model: all blocks at once, run forward and, block by block, back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.differentiable import linear, repeatable_training
from aphroquant.calibration.distill import (
    CHECKS,
    SCALE_STEP,
    divergence,
    logit_rows,
    output_gradient,
    step_share,
)
from aphroquant.calibration.refine import BATCH_WINDOWS, Numbers, batches, split_windows
from aphroquant.calibration.training import TrainedGain, TrainedWeight
from aphroquant.conversion.blocks import SolvedBlock
from aphroquant.conversion.calibration_block import CalibrationBlock, load_calibration_block
from aphroquant.conversion.job.steps import StepKeeper, Steps
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.targets import is_trainable
from aphroquant.conversion.training import WindowForward, trained_norms, trained_weight
from aphroquant.errors import InputError
from aphroquant.models.decoder import rms_norm
from aphroquant.models.loader import load_embedding, load_final_norm, load_head
from aphroquant.models.spec import FINAL_NORM
from aphroquant.schemes import QuantizedWeight

CPU = torch.device("cpu")


class Distilled(NamedTuple):
    """The blocks with the best numbers seen, and what the report says of it."""

    blocks: list[SolvedBlock]
    report: dict[str, Any]


@dataclass
class _Layer:
    """`frame` is the block without the weights that are quantized: some are trained, others stay what they are."""

    frame: CalibrationBlock
    weights: dict[str, TrainedWeight]
    fixed: dict[str, QuantizedWeight]
    gains: dict[str, TrainedGain]

    def fixed_values(self) -> dict[str, Tensor]:
        return {name: weight.dequantize() for name, weight in self.fixed.items()}


class Distiller:
    """A whole model with trained scales and gains. Holds codes, not dense weights: those exist a block at a time."""

    def __init__(
        self,
        plan: ConversionPlan,
        windows: Tensor,
        solved: Sequence[SolvedBlock],
        source_states: Tensor,
        device: torch.device = CPU,
    ) -> None:
        """`source_states` [T, H] are the source's hidden states of all windows [B, S] before the final norm."""
        self._plan, self._windows, self._device = plan, windows, device
        self._source_states = source_states
        self._forward = WindowForward(plan.spec, windows.shape[1], device)
        checkpoint = plan.checkpoint
        self._embedding, self._head = load_embedding(checkpoint), load_head(checkpoint).to(device)
        self._source_gain = load_final_norm(checkpoint).to(device)
        dtype = checkpoint.tensors[f"{FINAL_NORM}.weight"].dtype
        self._final = TrainedGain(self._source_gain, dtype)
        self._layers = [self._layer(block) for block in solved]

    def run(
        self, solved: Sequence[SolvedBlock], on_step: Callable[[int, int], None], keeper: StepKeeper | None = None
    ) -> Distilled:
        """Train, and return `solved` with the best numbers seen on windows that no step was taken on.

        The `keeper` is told of every step, and may know of a training that did not end: then it goes on.
        """
        steps, keeper = self._plan.distill_steps, keeper or StepKeeper()
        trained, held_out = split_windows(len(self._windows))
        checks = {steps * (check + 1) // CHECKS for check in range(CHECKS)}
        with repeatable_training(self._device):
            found = keeper.go_on(self._state()) or self._beginning(held_out)
            order = enumerate(batches(trained, steps, BATCH_WINDOWS, self._plan.request.seed))
            for step, batch in islice(order, found.done, None):
                self._step(batch, step_share(step, steps))
                found = found._replace(done=step + 1)
                if step + 1 in checks:
                    found = self._better(found, held_out)
                keeper.keep(found, self._state(), last=step + 1 == steps)
                on_step(step + 1, steps)
        before, best = found.facts["before"], found.facts["best"]
        report = {"steps": steps, "held_out_kld_before": before, "held_out_kld_after": best}
        if not found.best:
            return Distilled(list(solved), report)
        for name, tensor in self._moved().items():
            tensor.copy_(found.best[name])
        return Distilled(self._taken_over(solved, self._numbers()), report)

    def _beginning(self, held_out: Sequence[int]) -> Steps:
        before = self._divergence(held_out)
        return Steps(0, {}, {"before": before, "best": before})

    def _better(self, found: Steps, held_out: Sequence[int]) -> Steps:
        """With the numbers as they are now, if they are the best so far."""
        now = self._divergence(held_out)
        if not now < found.facts["best"]:  # nor if it is no number
            return found
        best = {name: tensor.clone() for name, tensor in self._moved().items()}
        return found._replace(best=best, facts=found.facts | {"best": now})

    def _trained(self) -> dict[str, TrainedWeight | TrainedGain]:
        """Everything that moves, by names that are the same in every run."""
        trained: dict[str, TrainedWeight | TrainedGain] = {FINAL_NORM: self._final}
        for layer in self._layers:
            own: dict[str, TrainedWeight | TrainedGain] = {**layer.weights, **layer.gains}
            trained |= {f"{layer.frame.prefix}.{name}": each for name, each in own.items()}
        return trained

    def _moved(self) -> dict[str, Tensor]:
        return {f"{name}/{part}": t for name, each in self._trained().items() for part, t in each.moved().items()}

    def _state(self) -> dict[str, Tensor]:
        momenta = {f"{name}/{part}": t for name, each in self._trained().items() for part, t in each.momenta().items()}
        return self._moved() | momenta

    def _layer(self, solved: SolvedBlock) -> _Layer:
        frame = load_calibration_block(self._plan.checkpoint, solved.layer, self._windows.shape[1], self._device)
        weights, fixed = dict[str, TrainedWeight](), dict[str, QuantizedWeight]()
        for name, own in frame.linears.items():
            module = f"{frame.prefix}.{name}"
            bias = solved.changed.get(f"{module}.bias")
            own.bias = own.bias if bias is None else bias.float().to(self._device)
            if module in solved.solutions:
                weight = solved.solutions[module].weight.to(self._device)
                if is_trainable(self._plan.schemes[module]):
                    weights[name] = trained_weight(weight)
                else:
                    fixed[name] = weight
                own.weight = torch.empty(0)
        gains = {}
        for norm, gain in frame.norms.items():
            name = f"{frame.prefix}.{norm}.weight"
            frame.norms[norm] = solved.changed.get(name, gain).float().to(self._device)
        for norm in trained_norms(frame, self._plan.modules.__contains__):
            dtype = self._plan.checkpoint.tensors[f"{frame.prefix}.{norm}.weight"].dtype
            gains[norm] = TrainedGain(frame.norms[norm], dtype)
        return _Layer(frame, weights, fixed, gains)

    def _step(self, batch: Sequence[int], share: float) -> None:
        states = [self._embedded(batch)]
        with torch.no_grad():
            for layer in self._layers:
                values = layer.fixed_values() | {name: weight.value() for name, weight in layer.weights.items()}
                gains = {name: gain.value() for name, gain in layer.gains.items()}
                states.append(self._forward.block(layer.frame, values, gains, states[-1]))
        output = output_gradient(
            states.pop(), self._final.value(), self._source(batch), self._source_gain, self._logits, len(self._head)
        )
        if not torch.isfinite(torch.tensor(output.divergence)):
            raise InputError("the quantized model's logits on the calibration text are not finite")
        size = torch.tensor(SCALE_STEP * share, device=self._device)
        self._final.step(output.by_gain, size)
        gradient = output.by_hidden
        for layer in reversed(self._layers):
            gradient = self._back(layer, states.pop(), gradient, size)

    def _back(self, layer: _Layer, hidden: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """Run one block again, take its step, and return the gradient by its input."""
        values = {name: weight.value() for name, weight in layer.weights.items()}
        gains = {name: gain.value() for name, gain in layer.gains.items()}
        hidden.requires_grad_()
        with torch.enable_grad():
            numbers = layer.fixed_values() | values
            self._forward.block(layer.frame, numbers, gains, hidden).backward(gradient)  # type: ignore[no-untyped-call]
        for name, weight in layer.weights.items():
            by_weight = values.pop(name).grad
            assert by_weight is not None
            weight.step(by_weight, size)
        for norm, gain in layer.gains.items():
            by_gain = gains[norm].grad
            assert by_gain is not None
            gain.step(by_gain, size)
        assert hidden.grad is not None
        return hidden.grad

    @torch.no_grad()
    def _divergence(self, windows: Sequence[int]) -> float:
        """Mean over all positions of these windows, with the numbers that would be stored."""
        total = 0.0
        for start in range(0, len(windows), BATCH_WINDOWS):
            batch = windows[start : start + BATCH_WINDOWS]
            hidden = self._embedded(batch)
            for layer in self._layers:
                rounded = {name: weight.rounded().dequantize() for name, weight in layer.weights.items()}
                weights = layer.fixed_values() | rounded
                gains = {name: gain.rounded().float() for name, gain in layer.gains.items()}
                hidden = self._forward.block(layer.frame, weights, gains, hidden)
            source, gain = self._source(batch), self._final.rounded().float()
            for rows in logit_rows(hidden.shape[0], len(self._head)):
                expected = self._logits(source[rows], self._source_gain)
                total += float(divergence(expected, self._logits(hidden[rows], gain)).sum())
        return total / (len(windows) * self._windows.shape[1])

    def _numbers(self) -> list[Numbers]:
        """Copies, on the CPU, of what would be stored: of each block, and last the final gain."""
        numbers = [
            Numbers(
                {name: weight.rounded().to(CPU) for name, weight in layer.weights.items()},
                {name: gain.rounded().cpu() for name, gain in layer.gains.items()},
            )
            for layer in self._layers
        ]
        return [*numbers, Numbers({}, {FINAL_NORM: self._final.rounded().cpu()})]

    def _taken_over(self, solved: Sequence[SolvedBlock], numbers: Sequence[Numbers]) -> list[SolvedBlock]:
        blocks = []
        for block, layer, found in zip(solved, self._layers, numbers[:-1], strict=True):
            prefix = layer.frame.prefix
            solutions = {
                module: replace(solution, weight=found.weights.get(module.removeprefix(f"{prefix}."), solution.weight))
                for module, solution in block.solutions.items()
            }
            gains = {f"{prefix}.{norm}.weight": gain for norm, gain in found.gains.items()}
            blocks.append(replace(block, solutions=solutions, changed=block.changed | gains))
        blocks[-1].changed[f"{FINAL_NORM}.weight"] = numbers[-1].gains[FINAL_NORM]
        return blocks

    def _embedded(self, batch: Sequence[int]) -> Tensor:
        ids = self._windows[torch.tensor(batch)].reshape(-1)
        return self._embedding[ids].to(self._device)

    def _source(self, batch: Sequence[int]) -> Tensor:
        states = self._source_states.view(len(self._windows), self._windows.shape[1], -1)
        return states[torch.tensor(batch)].flatten(0, 1).to(self._device)

    def _logits(self, hidden: Tensor, gain: Tensor) -> Tensor:
        return linear(rms_norm(hidden, gain, self._plan.spec.norm_eps), self._head)
