"""Residual add and RMSNorm in one pass, optionally with the result quantized."""

from __future__ import annotations

from ctypes import c_float

import torch
from torch import Tensor

from aphroquant.kernels.cuda.fused.elements import OutputFormat, Quantized, element_macro, empty_output, row_threads
from aphroquant.kernels.cuda.launcher import Kernel, cuda_kernel


class FusedRmsNorm:
    """residual += delta; gain * residual / sqrt(mean(residual**2) + eps), over rows of `hidden_size`.

    The residual stream is float32 [T, H] and changed in place; `delta` [T, H] and the result are in `dtype`.
    """

    def __init__(
        self, hidden_size: int, eps: float, dtype: torch.dtype, output: OutputFormat = OutputFormat.ELEMENT
    ) -> None:
        self._hidden_size, self._dtype, self._output = hidden_size, dtype, output
        self._eps = c_float(eps)
        self._threads = row_threads(hidden_size)
        self._kernels: dict[tuple[bool, bool], Kernel] = {}

    def __call__(
        self,
        residual: Tensor,
        delta: Tensor | None,
        gain: Tensor,
        *,
        rows: Tensor | None = None,
        programmatic: bool = False,
    ) -> Tensor | Quantized:
        """The normed rows [T, H], or with `rows` (int32 [R]) only those, [R, H]; the residual then stays as it is.

        `gain` is float32 [H].
        """
        num_rows = residual.shape[0] if rows is None else rows.shape[0]
        result = empty_output((num_rows, self._hidden_size), residual, self._output, self._dtype)
        if num_rows:
            self._kernel(delta is not None, rows is not None).launch(
                grid=(num_rows, 1, 1),
                block=(self._threads, 1, 1),
                args=[residual, delta, gain, rows, result.codes, result.scales, self._eps],
                programmatic=programmatic,
            )
        return result.codes if self._output is OutputFormat.ELEMENT else result

    def _kernel(self, has_delta: bool, has_rows: bool) -> Kernel:
        found = self._kernels.get((has_delta, has_rows))
        if found is None:
            macros = {
                "HIDDEN_SIZE": self._hidden_size,
                "THREADS": self._threads,
                "HAS_DELTA": int(has_delta),
                "HAS_ROWS": int(has_rows),
                "OUTPUT_FORMAT": int(self._output),
            } | element_macro(self._dtype)
            found = self._kernels[has_delta, has_rows] = cuda_kernel("fused_rms_norm.cu", "fused_rms_norm", macros)
        return found
