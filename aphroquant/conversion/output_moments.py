"""E[g g^T] of every layer's outputs: what errors of one output, beside those of the others, do to the logits.

g is the gradient of -log p(y) by a layer's outputs, with y drawn from what the source itself predicts: its second
moment is the Fisher matrix of the divergence from the source. One pass forward keeps the states in front of every
block, in a file past a limit, and one pass backward runs each block again: one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from aphroquant.calibration.differentiable import linear, repeatable_training
from aphroquant.calibration.distill import logit_rows
from aphroquant.calibration.gram import gram
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, chunks, default_memory_limit
from aphroquant.conversion.calibration_block import BlockLinear, CalibrationBlock, load_calibration_block
from aphroquant.conversion.source_pass import embedded
from aphroquant.errors import InputError
from aphroquant.models.decoder import Linear, rms_norm
from aphroquant.models.loader import load_final_norm, load_head

OBSERVED_TOKENS = 1 << 13  # of evenly spread windows
MAX_OUTPUTS = 1 << 13  # wider layers are left without: their matrices, of all blocks, would be the size of the model

Told = Callable[[int, int], None]  # blocks done, blocks in all


class OutputMoments:
    """E[g g^T] by module, on the CPU, or in temporary files where they do not fit into memory."""

    def __init__(self, modules: Collection[str], memory_limit: int) -> None:
        self._modules, self._limit = modules, memory_limit
        self._found: dict[str, Activations] = {}

    def of(self, module: str) -> Tensor | None:
        """[N, N], or None where it was not asked for or is too large."""
        return self._found[module].rows if module in self._found else None

    def wants(self, module: str, num_outputs: int) -> bool:
        return module in self._modules and num_outputs <= MAX_OUTPUTS

    def keep(self, module: str, moment: Tensor) -> None:
        self._found[module] = Activations(*moment.shape, memory_limit=self._limit)
        self._found[module].rows.copy_(moment)


def output_moments(
    checkpoint: Checkpoint,
    windows: Tensor,
    modules: Collection[str],
    *,
    seed: int,
    device: torch.device,
    on_block: Told = lambda done, total: None,
) -> OutputMoments:
    """Of the source, over some of the windows [B, S]. InputError where its gradients are not finite."""
    spec, window_len = checkpoint.spec, windows.shape[1]
    assert spec.experts is None
    count = min(len(windows), max(1, OBSERVED_TOKENS // window_len))
    chosen = windows[torch.arange(count) * len(windows) // count]
    limit = default_memory_limit(spec.num_layers + 2)
    found = OutputMoments(modules, default_memory_limit(2) // max(1, len(modules)))
    states = [embedded(checkpoint, chosen, memory_limit=limit, device=device)]
    load = partial(load_calibration_block, checkpoint, window_len=window_len, device=device)
    for layer in range(spec.num_layers):
        states.append(_behind(load(layer), states[-1], window_len, limit, device))
        on_block(layer + 1, 2 * spec.num_layers)
    gradient = states.pop()
    with repeatable_training(device):
        _replace_by_gradient(gradient, checkpoint, seed, device)
        for layer in reversed(range(spec.num_layers)):
            _Backward(load(layer), found, window_len, device).run(states.pop(), gradient)
            on_block(2 * spec.num_layers - layer, 2 * spec.num_layers)
    return found


@torch.no_grad()
def _behind(
    block: CalibrationBlock, states: Activations, window_len: int, limit: int, device: torch.device
) -> Activations:
    behind = Activations(len(states), states.rows.shape[1], memory_limit=limit, device=device)
    for rows in chunks(len(states), window_len):
        behind.rows[rows] = block.forward(states.rows[rows].to(device)).to(behind.rows.device)
    return behind


def _replace_by_gradient(states: Activations, checkpoint: Checkpoint, seed: int, device: torch.device) -> None:
    """The states behind the last block by the gradients of -log p(y) by them."""
    head, gain = load_head(checkpoint).to(device), load_final_norm(checkpoint).to(device)
    random = torch.Generator().manual_seed(seed)
    for rows in logit_rows(len(states), len(head)):
        hidden = states.rows[rows].to(device).requires_grad_()
        with torch.enable_grad():
            logs = linear(rms_norm(hidden, gain, checkpoint.spec.norm_eps), head).log_softmax(-1)
        draw = torch.rand(logs.shape[0], 1, generator=random).to(device)
        sums = logs.detach().exp().cumsum(-1)
        drawn = torch.searchsorted(sums, draw * sums[:, -1:]).clamp_(max=logs.shape[1] - 1)
        (-logs.gather(1, drawn).sum()).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        states.rows[rows] = hidden.grad.to(states.rows.device)


class _Backward:
    """One block, run again with gradients, adding up what they are at the outputs of its layers."""

    def __init__(self, block: CalibrationBlock, found: OutputMoments, window_len: int, device: torch.device) -> None:
        self._found, self._prefix, self._window_len, self._device = found, block.prefix, window_len, device
        self._sums: dict[str, Tensor] = {}
        self._block = block.copy()
        self._block.block.linears = {name: self._observing(name, own) for name, own in block.linears.items()}

    def run(self, states: Activations, gradient: Activations) -> None:
        """Replace the gradients [T, H] by the states behind the block by those in front of it, and keep the moments."""
        for rows in chunks(len(states), self._window_len):
            hidden = states.rows[rows].to(self._device).requires_grad_()
            with torch.enable_grad():
                output = self._block.forward(hidden)
            output.backward(gradient.rows[rows].to(self._device))  # type: ignore[no-untyped-call]
            assert hidden.grad is not None
            gradient.rows[rows] = hidden.grad.to(gradient.rows.device)
        for name, total in self._sums.items():
            if not torch.isfinite(total).all():
                raise InputError(f"{self._prefix}.{name}: gradients on the calibration text are not finite")
            self._found.keep(f"{self._prefix}.{name}", total / len(states))

    def _observing(self, name: str, own: BlockLinear) -> Linear:
        wanted = self._found.wants(f"{self._prefix}.{name}", own.weight.shape[0])

        def call(x: Tensor) -> Tensor:
            output = linear(x, own.weight, own.bias)
            if wanted:
                output.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
            return output

        return call

    def _add(self, name: str, gradient: Tensor) -> None:
        moment = gram(gradient.contiguous())
        self._sums[name] = self._sums[name].add_(moment) if name in self._sums else moment
