"""Single linear layers on the compiled kernels."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cpu.abi import aligned_bytes
from aphroquant.kernels.cpu.grouped import grouped
from aphroquant.kernels.cpu.inputs import input_settings, unsupported
from aphroquant.kernels.cpu.library import library
from aphroquant.kernels.cpu.packing import pack
from aphroquant.schemes import QuantizedWeight


class CpuLinear:
    """y = x @ W.T + bias. A row's result does not depend on the other rows or on the number of threads."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, *, activations: str, num_threads: int | None = None
    ) -> None:
        if activations not in ("int8", "float"):
            raise UsageError(f"activations = {activations!r} must be int8 or float")
        if reason := unsupported(weight.scheme):
            raise UsageError(f"the compiled kernels do not support {reason}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise UsageError(f"bias has shape {list(bias.shape)}, but the layer has {self.out_features} outputs")
        codes = grouped(weight)
        settings = input_settings(weight, codes, activations)
        self._packed = pack(codes, bias, max_chunk=settings.max_chunk)
        settings.fill(self._packed.struct)
        self._num_threads = num_threads
        self._workspace = aligned_bytes(0)

    @property
    def chunk_len(self) -> int:
        """Columns of a group that share one dot product, and one scale of the row where inputs are quantized here."""
        return int(self._packed.struct.chunk_len)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        if x.dim() != 2 or x.shape[1] != self.in_features or not x.is_floating_point() or x.device.type != "cpu":
            found = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise UsageError(f"input is {found}, but must be a float [rows, {self.in_features}] on the CPU")
        rows = x.detach().to(torch.float32).contiguous()
        y = torch.empty(rows.shape[0], self.out_features)
        if y.numel() == 0:
            return y.to(x.dtype)
        num_threads = self._num_threads or torch.get_num_threads()
        struct = byref(self._packed.struct)
        num_bytes = library().aq_linear_workspace(struct, rows.shape[0], num_threads)
        if self._workspace.numel() < num_bytes:
            self._workspace = aligned_bytes(num_bytes)
        library().aq_linear(
            struct, rows.data_ptr(), rows.shape[0], y.data_ptr(), self._workspace.data_ptr(), num_threads
        )
        return y.to(x.dtype)
