"""activation(gate) * up in one pass, optionally with the result quantized."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from aphroquant.kernels.cuda.fused.elements import (
    OutputFormat,
    Quantized,
    element_macro,
    empty_output,
    row_threads,
    vector_width,
)
from aphroquant.kernels.cuda.launcher import cuda_kernel

Activation = Literal["silu", "gelu_tanh", "gelu"]
_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_THREADS = 256  # of a block that has a part of a row


class FusedGatedActivation:
    """activation(gate) * up for rows [gate, up] of twice `size` columns."""

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        activation: Activation = "silu",
        output: OutputFormat = OutputFormat.ELEMENT,
    ) -> None:
        self._size, self._dtype, self._output = size, dtype, output
        whole_rows = output is not OutputFormat.ELEMENT
        self._threads = row_threads(size) if whole_rows else min(_THREADS, row_threads(size, items=1))
        vectors = size // vector_width(size)
        self._blocks = 1 if whole_rows else -(-vectors // self._threads)
        macros = {
            "SIZE": size,
            "THREADS": self._threads,
            "ACTIVATION": _ACTIVATIONS[activation],
            "OUTPUT_FORMAT": int(output),
        } | element_macro(dtype)
        self._kernel = cuda_kernel("fused_gated_activation.cu", "fused_gated_activation", macros)

    def __call__(self, gate_up: Tensor, *, programmatic: bool = False) -> Tensor | Quantized:
        """[T, 2 * size] -> [T, size]."""
        num_rows = gate_up.shape[0]
        result = empty_output((num_rows, self._size), gate_up, self._output, self._dtype)
        if num_rows:
            self._kernel.launch(
                grid=(self._blocks, num_rows, 1),
                block=(self._threads, 1, 1),
                args=[gate_up, result.codes, result.scales],
                programmatic=programmatic,
            )
        return result.codes if self._output is OutputFormat.ELEMENT else result
