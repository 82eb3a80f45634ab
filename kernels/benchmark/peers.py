"""Other projects' kernels, timed beside ours on the same weight: what torch brings, and libraries in a folder.

The folder may hold vLLM's compiled operators (vllm026*_C*.so or .so.xz, vllm033*), Meta's MSLK (mslk*) and the aqlm
package's wheel. Each takes the weight in a layout of its own, which is made here from the scheme's tensors.
"""

from __future__ import annotations

import lzma
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.benchmark import aqlm_peer
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, QuantizedWeight, Scheme

Run = Callable[[Tensor], Tensor]
FP8_MAX = 448.0
_UINT4_WITH_ZERO_8 = 1125899907892224  # vLLM's number for unsigned 4-bit codes whose zero point is 8


def _same(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    return weight


@dataclass(frozen=True)
class Peer:
    """A kernel: `make` prepares a weight. `weight_of` says which numbers it gets, and so what it has to read."""

    name: str
    make: Callable[[QuantizedWeight], Run]
    weight_of: Callable[[QuantizedWeight, torch.dtype], QuantizedWeight] = _same
    exact: bool = True  # its result is comparable with float64 of `weight_of`'s numbers


def find_peers(scheme: Scheme, dtype: torch.dtype, folder: Path | None) -> Iterator[Peer]:
    """Those that can run this scheme in this dtype here."""
    yield Peer(f"cuBLAS {str(dtype).removeprefix('torch.')}", _cublas, dense_weight)
    if isinstance(scheme, FloatScheme) and scheme.granularity == "channel" and scheme.activations is not None:
        yield Peer("torch._scaled_mm (inputs quantized before)", _scaled_mm)
        if folder is not None and load_vllm(folder):
            yield Peer("vLLM CUTLASS (inputs quantized before)", partial(_cutlass, dtype=dtype))
            if hasattr(_operators(), "dynamic_per_token_scaled_fp8_quant"):
                yield Peer("vLLM CUTLASS", partial(_quantize_and_cutlass, dtype=dtype))
    if folder is not None and aqlm_peer.takes(scheme, folder):
        yield Peer("aqlm package", partial(aqlm_peer.prepare, folder=folder, dtype=dtype))
    if not _plain_int4(scheme):
        return
    if dtype == torch.bfloat16:
        yield Peer("tinygemm", _tinygemm)
    if folder is None:
        return
    if version := load_vllm(folder):
        yield Peer("Marlin", partial(_marlin, version=version))
        if torch.cuda.get_device_capability() == (9, 0):
            yield Peer("Machete", _machete)
    if dtype == torch.bfloat16 and _load(folder, "mslk*"):
        yield Peer("MSLK", _mslk)


def dense_weight(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """The same numbers in 16 bit, for kernels that know no quantization."""
    if isinstance(weight.scheme, DenseScheme) and weight.scheme.dtype == dtype:
        return weight
    return QuantizedWeight.dense(weight.dequantize(dtype))


def check_peers(folder: Path) -> None:
    """UsageError unless there is something in the folder."""
    if not folder.is_dir():
        raise UsageError(f"--peers {folder} is no directory")
    libraries = any(_files(folder, pattern) for pattern in ("vllm*_C*", "mslk*"))
    if not libraries and not any(folder.glob(aqlm_peer.PATTERN)):
        raise UsageError(f"--peers {folder} holds none of vllm*_C*.so[.xz], mslk*.so[.xz] and {aqlm_peer.PATTERN}")


def _plain_int4(scheme: Scheme) -> bool:
    return (
        isinstance(scheme, IntegerScheme)
        and (scheme.bits, scheme.group_size, scheme.symmetric) == (4, 128, True)
        and not scheme.act_order
        and scheme.activations is None
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.glob(pattern)) if path.name.endswith((".so", ".so.xz"))]


@cache
def load_vllm(folder: Path) -> str | None:
    """Load vLLM's operators; its release ("026") if they are there."""
    for release in ("026", "033"):  # one a process: all register the same names
        if _load(folder, f"vllm{release}*_C*"):
            return release
    return None


@cache
def _load(folder: Path, pattern: str) -> bool:
    """Load the first library of that name, unpacked first if need be."""
    files = _files(folder, pattern)
    if not files:
        return False
    path = files[0]
    if path.suffix == ".xz":
        path = Path(tempfile.mkdtemp(prefix="aphroquant-peers-")) / path.stem
        with lzma.open(files[0]) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 24)
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return True


def _operators() -> Any:
    return torch.ops._C


def _cublas(weight: QuantizedWeight) -> Run:
    matrix = weight["weight"].clone()
    return lambda x: torch.nn.functional.linear(x, matrix)


def _tinygemm(weight: QuantizedWeight) -> Run:
    codes = weight["codes"]
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    scales = weight["scales"].T
    pairs = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()  # [G, N, 2]
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, pairs)


def _eight_a_word(codes: Tensor) -> Tensor:
    """[N, K] -> int32 [K/8, N], the lowest k in the lowest bits."""
    nibbles = codes.T.to(torch.int32)
    words = torch.zeros(nibbles.shape[0] // 8, nibbles.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(8):
        words |= nibbles[i::8] << (4 * i)
    return words


def _marlin(weight: QuantizedWeight, version: str) -> Run:
    (n, k), operators = weight.shape, _operators()
    words, device = _eight_a_word(weight["codes"]), weight["codes"].device
    order = [i + 8 * j for i in range(8) for j in range(8)]
    scales = weight["scales"].T.reshape(-1, 64)[:, order].reshape(-1, n).contiguous()
    locks = torch.zeros(
        torch.cuda.get_device_properties(device).multi_processor_count, dtype=torch.int32, device=device
    )
    kind, tail = _UINT4_WITH_ZERO_8, (False, True, False)
    if version == "026":
        packed = operators.gptq_marlin_repack(words, torch.empty(0, dtype=torch.int32, device=device), k, n, 4, False)
        empty = (None,) * 5
        return lambda x: operators.marlin_gemm(
            x, None, packed, None, scales, *empty, locks, kind, x.shape[0], n, k, True, *tail
        )
    packed = operators.gptq_marlin_repack(words, k, n, 4, False)
    return lambda x: operators.marlin_gemm(
        x, None, packed, None, scales, None, None, None, locks, kind, x.shape[0], n, k, *tail
    )


def _machete(weight: QuantizedWeight) -> Run:
    operators, scales = _operators(), weight["scales"].T.contiguous()
    words, kind = _eight_a_word(weight["codes"]).T.contiguous().T, _UINT4_WITH_ZERO_8
    packed = operators.machete_prepack_B(words, scales.dtype, kind, scales.dtype)
    return lambda x: operators.machete_mm(x, packed, kind, None, scales, None, 128, None, None, None)


def _mslk(weight: QuantizedWeight) -> Run:
    codes = weight["codes"].to(torch.int8) - 8
    pairs = ((codes[:, ::2] & 0xF) | (codes[:, 1::2] << 4)).contiguous()
    operators: Any = torch.ops.mslk
    packed, scales = operators.preshuffle_i4(pairs, weight["scales"].T.contiguous().bfloat16())
    zeros = torch.zeros_like(weight["scales"].T.contiguous())
    return lambda x: operators.bf16i4bf16_shuffled(x, packed, scales, zeros)


class QuantizedInputs:
    """Rows in FP8 with a scale each, made once for an input and kept: left out of what is timed."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.data_ptr() not in self._kept:
            scales = (x.float().abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=1e-8)
            self._kept[x.data_ptr()] = (x, (x.float() / scales).to(torch.float8_e4m3fn), scales)  # x: keeps its address
        return self._kept[x.data_ptr()][1:]


def _scaled_mm(weight: QuantizedWeight) -> Run:
    codes, scales, quantized = weight["codes"].clone(), weight["scales"].float().reshape(1, -1), QuantizedInputs()

    def run(x: Tensor) -> Tensor:
        rows, row_scales = quantized(x)
        return torch._scaled_mm(
            rows, codes.T, scale_a=row_scales, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return run


def _cutlass(weight: QuantizedWeight, dtype: torch.dtype) -> Run:
    return _cutlass_with(QuantizedInputs(), weight, dtype)


def _quantize_and_cutlass(weight: QuantizedWeight, dtype: torch.dtype) -> Run:
    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)
        _operators().dynamic_per_token_scaled_fp8_quant(codes, x, scales, None)
        return codes, scales

    return _cutlass_with(quantized, weight, dtype)


def _cutlass_with(
    quantized: Callable[[Tensor], tuple[Tensor, Tensor]], weight: QuantizedWeight, dtype: torch.dtype
) -> Run:
    codes, scales = weight["codes"].clone(), weight["scales"].float().reshape(1, -1)

    def run(x: Tensor) -> Tensor:
        rows, row_scales = quantized(x)
        out = torch.empty(x.shape[0], codes.shape[0], dtype=dtype, device=x.device)
        _operators().cutlass_scaled_mm(out, rows, codes.T, row_scales, scales, None)
        return out

    return run
