"""Launches with known results: each function gives the largest error that it saw."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int8, c_int32

import torch
from torch import Tensor

from aphroquant.kernels.cuda.launcher import Argument, Kernel, TensorMap, cuda_kernel

SOURCE = "launch_probe.cu"


class Affine(Structure):
    """The struct that launch_probe takes by value."""

    _fields_ = (("count", c_int32), ("scale", c_float), ("offset", c_double))
    alignment = 16


def arguments_and_shared_memory(device: int = 0) -> float:
    """Pointers, a struct, a byte; a grid with a remainder; more shared memory than the 48 KB that need no asking."""
    with torch.cuda.device(device):
        x = torch.randn(1000, device="cuda")
        y = _affine(cuda_kernel(SOURCE, "launch_probe"), x, shared_bytes=96 * 1024)
        return _error(y, 2.5 * x.double() - 0.25 - 3)


def dependent_launches() -> float:
    """A chain in which each kernel may start before the one whose result it reads has ended."""
    x = torch.randn(100_000, device="cuda")
    return _error(_chain(x, 8), _expected_chain(x, 8))


def graph_replay() -> float:
    """The chain captured in a graph and replayed on other numbers."""
    x, kept = torch.empty(5000, device="cuda"), []
    _chain(x, 4)  # nothing is left to load when the capture begins
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.append(_chain(x, 4))
    x.copy_(torch.randn_like(x))
    graph.replay()
    return _error(kept[0], _expected_chain(x, 4))


def other_stream() -> float:
    """On a stream of its own."""
    x = torch.randn(4096, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = _affine(cuda_kernel(SOURCE, "launch_probe"), x)
    torch.cuda.current_stream().wait_stream(stream)
    return _error(y, 2.5 * x.double() - 0.25 - 3)


def clusters() -> float:
    """Blocks know their rank in a cluster of 4, and in one of 16, which must be allowed first."""
    kernel, worst = cuda_kernel(SOURCE, "cluster_probe"), 0.0
    for size in (4, 16):
        ranks = torch.full((32,), -1, dtype=torch.int32, device="cuda")
        kernel.launch((32, 1, 1), (32, 1, 1), [ranks], cluster=(size, 1, 1))
        worst = max(worst, _error(ranks, torch.arange(32, device="cuda") % size))
    return worst


def tensor_map() -> float:
    """An 8 x 8 tile of a strided matrix, and one that reaches over its edge and reads zeros there."""
    kernel, worst = cuda_kernel(SOURCE, "tensor_map_probe"), 0.0
    matrix = torch.randn(30, 44, device="cuda")[:, :40]
    tensor_map = TensorMap.of(matrix, (8, 8))
    for row, column in ((5, 12), (25, 36)):
        tile = torch.full((8, 8), torch.nan, device="cuda")
        kernel.launch((1, 1, 1), (64, 1, 1), [tensor_map, tile, c_int32(row), c_int32(column)])
        padded = torch.nn.functional.pad(matrix, (0, 8, 0, 8))
        worst = max(worst, _error(tile, padded[row : row + 8, column : column + 8]))
    return worst


def _affine(kernel: Kernel, x: Tensor, *, shared_bytes: int = 1024, programmatic: bool = False) -> Tensor:
    y = torch.full_like(x, torch.nan)
    arguments: list[Argument] = [x, y, Affine(x.numel(), 2.5, -0.25), c_int8(-3)]
    grid = (-(-x.numel() // 256), 1, 1)
    kernel.launch(grid, (256, 1, 1), arguments, shared_bytes=shared_bytes, programmatic=programmatic)
    return y


def _chain(x: Tensor, length: int) -> Tensor:
    kernel = cuda_kernel(SOURCE, "launch_probe")
    for _ in range(length):
        x = _affine(kernel, x, programmatic=True)
    return x


def _expected_chain(x: Tensor, length: int) -> Tensor:
    expected = x.double()
    for _ in range(length):
        expected = 2.5 * expected - 0.25 - 3
    return expected


def _error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite if anything is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")
