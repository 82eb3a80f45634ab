"""The divergence of a model with chosen widths, measured: its blocks with quantized weights, on text kept for that."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from aphroquant.calibration.distill import divergence, logit_rows
from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.activations import Activations, chunks, default_memory_limit
from aphroquant.conversion.allocation.pieces import PieceStore
from aphroquant.conversion.calibration_block import load_calibration_block
from aphroquant.conversion.source_pass import embedded
from aphroquant.kernels.reference.matmul import linear
from aphroquant.models.decoder import rms_norm
from aphroquant.models.loader import load_final_norm, load_head


class MeasuredDivergence:
    """Mean KL divergence from the source over all positions of windows [B, S], for any choice of widths."""

    def __init__(self, checkpoint: Checkpoint, windows: Tensor, pieces: PieceStore, device: torch.device) -> None:
        self._checkpoint, self._windows, self._pieces = checkpoint, windows, pieces
        self._device = device
        self._gain, self._head = (load(checkpoint).to(device) for load in (load_final_norm, load_head))
        self._source = self._states({})

    @torch.no_grad()
    def of(self, chosen: Mapping[str, int]) -> float:
        """With the width at a place for each module; modules that are not named stay as in the source."""
        states = self._states(chosen)
        total = 0.0
        for rows in logit_rows(len(states), len(self._head)):
            total += float(divergence(self._logits(self._source, rows), self._logits(states, rows)).sum())
        return total / len(states)

    @torch.no_grad()
    def _states(self, chosen: Mapping[str, int]) -> Activations:
        spec, window_len = self._checkpoint.spec, self._windows.shape[1]
        hidden = embedded(self._checkpoint, self._windows, memory_limit=default_memory_limit(2), device=self._device)
        for layer in range(spec.num_layers):
            block = load_calibration_block(self._checkpoint, layer, window_len, self._device)
            for name, own in block.linears.items():
                module = f"{block.prefix}.{name}"
                if module in chosen:
                    own.weight = self._pieces.get(module, chosen[module]).to(self._device).dequantize()
            for rows in chunks(len(hidden), window_len):
                hidden.rows[rows] = block.forward(hidden.rows[rows].to(self._device)).to(hidden.rows.device)
        return hidden

    def _logits(self, states: Activations, rows: slice) -> Tensor:
        normed = rms_norm(states.rows[rows].to(self._device), self._gain, self._checkpoint.spec.norm_eps)
        return linear(normed, self._head)
