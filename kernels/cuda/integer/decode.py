"""The decode kernel: one launch for a few tokens, bound by the bytes of the weight."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int32
from dataclasses import dataclass

import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import gpu
from aphroquant.kernels.cuda.integer.decode_plan import (
    TOKENS_OF_TILE,
    DecodePlan,
    DecodeShape,
    SharedLayout,
    ceil_div,
    choose_plan,
    decode_macros,
    least_shared_bytes,
    shared_layout,
)
from aphroquant.kernels.cuda.integer.measured import measured_plan
from aphroquant.kernels.cuda.integer.packing import PackedInteger
from aphroquant.kernels.cuda.launcher import Kernel, cuda_kernel

SOURCE, ENTRY = "integer_decode.cu", "integer_decode"
TOKEN_COUNTS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
)  # a kernel is made for each, and serves fewer; more tokens take several launches


@dataclass(frozen=True)
class _Prepared:
    """The kernel for up to a number of tokens."""

    kernel: Kernel
    plan: DecodePlan
    layout: SharedLayout
    least_shared: int


class DecodeLinear:
    """Multiplies a packed weight by a few tokens. `planner` gives the plan for a number of tokens."""

    def __init__(
        self,
        packed: PackedInteger,
        bias: Tensor | None,
        dtype: torch.dtype,
        planner: Callable[[DecodeShape, int], DecodePlan] | None = None,
    ) -> None:
        self._packed, self._bias = packed, bias
        self._shape = DecodeShape.of(packed, dtype, bias is not None)
        extras = [packed.supers, c_float(packed.output_factor(dtype))]
        self._extras = extras if self._shape.has_extras else []
        self._zeros = packed.zeros if packed.zeros is not None else packed.offsets
        self._planner = planner or self._choose
        self._capability = gpu(packed.codes.get_device()).capability if packed.codes.is_cuda else (0, 0)
        self._prepared: dict[int, _Prepared] = {}

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x [T, K] -> out [T, N]."""
        if not x.is_contiguous() or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        step = TOKEN_COUNTS[-1]
        for first in range(0, x.shape[0], step):
            self._launch(x[first : first + step], out[first : first + step])

    def _launch(self, x: Tensor, out: Tensor) -> None:
        tokens = next(count for count in TOKEN_COUNTS if x.shape[0] <= count)
        prepared = self._prepared.get(tokens) or self._prepare(tokens)
        plan, packed = prepared.plan, self._packed
        prepared.kernel.launch(
            grid=(plan.num_blocks, 1, 1),
            block=(plan.num_warps * 32, 1, 1),
            args=[
                packed.codes,
                packed.scales,
                self._zeros,
                x,
                packed.columns,
                self._bias,
                out,
                c_int32(x.shape[0]),
                *self._extras,
            ],
            shared_bytes=max(prepared.layout.num_bytes(x.shape[0]), prepared.least_shared),
            cluster=(plan.cluster, 1, 1) if plan.cluster > 1 else None,
            programmatic=True,
        )

    def _prepare(self, tokens: int) -> _Prepared:
        plan, token_tiles = self._planner(self._shape, tokens), ceil_div(tokens, TOKENS_OF_TILE)
        kernel = cuda_kernel(SOURCE, ENTRY, decode_macros(self._shape, plan, token_tiles))
        layout = shared_layout(self._shape, plan, token_tiles)
        self._prepared[tokens] = _Prepared(kernel, plan, layout, least_shared_bytes(plan, self._capability))
        return self._prepared[tokens]

    def _choose(self, shape: DecodeShape, tokens: int) -> DecodePlan:
        device = self._packed.codes.get_device()
        if measured := measured_plan(shape, tokens, device):
            return measured
        found = gpu(device)
        return choose_plan(shape, tokens, found.multiprocessors, found.capability)
