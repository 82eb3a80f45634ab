"""Linear layers with FP8 weights on Hopper GPUs: with FP8 activations, or with 16-bit ones as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.device import gpu, require
from aphroquant.kernels.cuda.float8.packing import pack_float8
from aphroquant.kernels.cuda.float8.quantize import GROUP, Granularity, quantize_tokens
from aphroquant.kernels.cuda.float8.tiles import choose_tile
from aphroquant.kernels.cuda.float8.wgmma import Float8Tile, float8_multiply
from aphroquant.kernels.cuda.integer.batch import BatchLinear
from aphroquant.schemes import FloatScheme, QuantizedWeight, Scheme

_ALIGNMENT = 16  # bytes at which a row begins
_DTYPES = (torch.bfloat16, torch.float16)


def unsupported(scheme: Scheme) -> str | None:
    """Why these kernels cannot run a layer of that scheme on the current GPU, or None."""
    if not isinstance(scheme, FloatScheme):
        return f"{scheme} is no FP8 scheme"
    if scheme.dtype != torch.float8_e4m3fn:
        return f"the FP8 kernels multiply e4m3 codes, not {scheme.dtype}"
    if gpu(torch.cuda.current_device()).capability != (9, 0):
        return "the FP8 kernels need a Hopper GPU"
    inputs = scheme.activations
    if inputs is None:
        return None
    if inputs.kind != "float" or inputs.bits != 8:
        return f"the FP8 kernels take FP8 inputs, not {inputs.kind}{inputs.bits}"
    grouped = inputs.granularity == "group"
    if not grouped and scheme.block_shape is None:
        return None
    fits = scheme.block_shape is not None and scheme.block_shape[0] % 64 == 0 and scheme.block_shape[1] == GROUP
    if fits and grouped and inputs.group_size == GROUP and inputs.dynamic:
        return None
    return f"the FP8 kernels have no product of {scheme}"


class CudaFloat8Linear:
    """y = x @ W.T + bias for bf16 or fp16 x. Sums are float32, in a fixed order."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, device: torch.device | str = "cuda") -> None:
        require()
        if reason := unsupported(weight.scheme):
            raise UsageError(reason)
        assert isinstance(weight.scheme, FloatScheme)
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        self._scheme, self._inputs = weight.scheme, weight.scheme.activations
        if self._inputs is None:
            self._batch = BatchLinear(pack_float8(weight, device), self._bias)
            return
        codes = weight["codes"].to(device).view(torch.uint8)
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _ALIGNMENT))
        self._tiles: dict[int, Float8Tile] = {}
        self._codes = padded.contiguous().view(torch.float8_e4m3fn)
        self._scales = weight["scales"].to(device, torch.float32).contiguous()
        if self._scheme.block_shape is None:
            self._scales = self._scales.reshape(-1)
        self._input_scale = None if self._inputs.dynamic else weight["input_scale"].to(device, torch.float32).reshape(1)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, K] -> [T, N], in x's dtype."""
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype not in _DTYPES:
            found = f"{x.dtype} {list(x.shape)}"
            raise UsageError(f"input is {found}, but must be bfloat16 or float16 [rows, {self.in_features}]")
        if not x.shape[0] or not self.out_features:
            return x.new_empty(x.shape[0], self.out_features)
        return self._batch(x) if self._inputs is None else self._multiply(x.contiguous())

    @property
    def takes_codes(self) -> bool:
        """Whether inputs may come as codes with a scale for each token, made by whoever computes them."""
        dynamic = self._inputs is not None and self._inputs.dynamic
        return dynamic and self._scheme.block_shape is None and self.in_features % _ALIGNMENT == 0

    def multiply_codes(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """As a call, for x = codes e4m3 [T, K] * scales float32 [T]; the result is in `dtype`. Needs `takes_codes`."""
        if not codes.shape[0] or not self.out_features:
            return codes.new_empty(codes.shape[0], self.out_features, dtype=dtype)
        return float8_multiply(self._codes, self._scales, codes, scales, self._tile(codes), dtype, bias=self._bias)

    def _multiply(self, x: Tensor) -> Tensor:
        blocks = self._scheme.block_shape
        tile = self._tile(x)
        if blocks is not None:
            padded = -(-x.shape[0] // tile.tokens) * tile.tokens
            tokens = quantize_tokens(x, Granularity.GROUP, padded_tokens=padded)
        elif self._input_scale is None:
            tokens = quantize_tokens(x, Granularity.TOKEN)
        else:
            tokens = quantize_tokens(x, Granularity.GIVEN, scale=self._input_scale)
        return float8_multiply(
            self._codes,
            self._scales,
            tokens.codes,
            tokens.scales,
            tile,
            x.dtype,
            bias=self._bias,
            block_rows=None if blocks is None else blocks[0],
        )

    def _tile(self, x: Tensor) -> Float8Tile:
        tokens = x.shape[0]
        if tokens not in self._tiles:
            has_blocks = self._scheme.block_shape is not None
            shape = (self.out_features, self.in_features)
            self._tiles[tokens] = choose_tile(*shape, tokens, x.get_device(), has_blocks)
        return self._tiles[tokens]
