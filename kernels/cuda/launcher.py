"""Compiled kernels as objects that launch on torch's streams.

    kernel = cuda_kernel("integer_decode.cu", "integer_decode", {"BITS": 4})
    kernel.launch(grid=(64, 1, 1), block=(128, 1, 1), args=[weight, x, y, c_int32(num_rows)])

A launch packs its arguments into one record by a format that is made once for each combination of argument types.
"""

from __future__ import annotations

import ctypes
import operator
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import Structure, _SimpleCData, c_uint32, sizeof
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.kernels.cuda.compiler import compile_kernel
from aphroquant.kernels.cuda.device import architecture, require
from aphroquant.kernels.cuda.driver import CudaError, LoadedFunction, check, load_function
from aphroquant.kernels.cuda.native_launcher import Header, launch_function
from aphroquant.kernels.cuda.tensor_map import TensorMap
from aphroquant.kernels.cuda.variants import Macro

__all__ = ["Argument", "Kernel", "TensorMap", "cuda_kernel"]

_HEADER = "@4P12I"
_NO_CLUSTER = (0, 0, 0)
Argument: TypeAlias = "Tensor | Structure | _SimpleCData[Any] | None"

_kernels: dict[tuple[str, str, tuple[tuple[str, Macro], ...]], Kernel] = {}
_kernels_lock = threading.Lock()


def cuda_kernel(source: str, entry: str, macros: Mapping[str, Macro] | None = None) -> Kernel:
    """The kernel `entry` of `source` (relative to source/), compiled and loaded for torch's current device.

    The same arguments give the same object. UsageError if CUDA kernels cannot run here.
    """
    key = (source, entry, tuple(sorted(macros.items())) if macros else ())
    kernel = _kernels.get(key)
    if kernel is None:
        require()
        with _kernels_lock:
            kernel = _kernels.setdefault(key, Kernel(source, entry, dict(macros or {})))
    kernel.on(torch.cuda.current_device())
    return kernel


@dataclass(frozen=True)
class _Signature:
    """How arguments of certain types become the bytes of a record."""

    record: struct.Struct
    convert: tuple[Callable[[Any], Any], ...]
    offsets: ctypes.Array[c_uint32]
    offsets_address: int
    sizes: tuple[int, ...]
    first_tensor: int | None


class Kernel:
    """One entry function with its macros; loaded on a device when it is first needed there."""

    def __init__(self, source: str, entry: str, macros: Mapping[str, Macro]) -> None:
        self.source, self.entry, self.macros = source, entry, macros
        self._functions: dict[int, LoadedFunction] = {}
        self._signatures: dict[tuple[type, ...], _Signature] = {}
        self._lock = threading.Lock()
        self._launch = launch_function()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.macros.items())
        return f"{self.entry}({settings})"

    def __deepcopy__(self, memo: object) -> Kernel:
        return self  # what is loaded is shared; a layer's copy differs in its tensors

    def on(self, device: int) -> LoadedFunction:
        """The kernel on that device; tells its registers and limits."""
        if found := self._functions.get(device):
            return found
        with self._lock:
            if device not in self._functions:
                compiled = compile_kernel(self.source, self.macros, architecture(device))
                self._functions[device] = load_function(compiled.cubin, self.entry, device)
            return self._functions[device]

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[Argument],
        shared_bytes: int = 0,
        cluster: tuple[int, int, int] | None = None,
        programmatic: bool = False,
    ) -> None:
        """Launch on the current stream of the first tensor's device.

        Arguments: a tensor (its address), None (a null pointer), a ctypes scalar, a structure by value.
        `programmatic`: may start before the kernel in front of it in the stream ends, and must wait for it by
        griddepcontrol.wait before it reads what that one writes. Has no effect below compute capability 9.0.
        """
        signature = self._signatures.get(tuple(map(type, args))) or self._sign(args)
        first = signature.first_tensor
        device = torch.cuda.current_device() if first is None else args[first].get_device()  # type: ignore[union-attr]
        function = self._functions.get(device) or self._load(device, signature)
        record = signature.record.pack(
            function.handle,
            function.context,
            torch._C._cuda_getCurrentRawStream(device),
            signature.offsets_address,
            len(args),
            *grid,
            *block,
            *(cluster or _NO_CLUSTER),
            shared_bytes,
            programmatic and function.capability_major >= 9,
            *[convert(arg) for convert, arg in zip(signature.convert, args)],  # noqa: B905
        )
        if result := self._launch(record):
            self._explain(result, function, grid, block, shared_bytes, cluster)

    def _load(self, device: int, signature: _Signature) -> LoadedFunction:
        if device < 0:
            raise UsageError(f"the first tensor argument of {self!r} is on the CPU, but the kernel runs on a GPU")
        function = self.on(device)
        self._check(signature, function)
        return function

    def _sign(self, args: Sequence[Argument]) -> _Signature:
        signature = sign(args)
        for function in self._functions.values():
            self._check(signature, function)
        self._signatures[tuple(map(type, args))] = signature
        return signature

    def _check(self, signature: _Signature, function: LoadedFunction) -> None:
        """What no compiler checks between Python and the GPU: as many parameters, each of the same size."""
        if function.parameters is None:
            return
        sizes = tuple(size for _, size in function.parameters)
        if sizes != signature.sizes:
            raise UsageError(f"{self!r} takes parameters of {list(sizes)} bytes, but got {list(signature.sizes)}")

    def _explain(
        self,
        result: int,
        function: LoadedFunction,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        cluster: tuple[int, int, int] | None,
    ) -> None:
        if shared_bytes > function.max_dynamic_shared:
            raise CudaError(
                f"{self!r} asks for {shared_bytes} bytes of shared memory; {function.max_dynamic_shared} are left"
            )
        threads = block[0] * block[1] * block[2]
        if threads > function.max_threads:
            raise CudaError(f"{self!r} asks for {threads} threads a block, but may have {function.max_threads}")
        where = f"grid {grid}, block {block}, {shared_bytes} bytes of shared memory, cluster {cluster}"
        check(result, f"launching {self!r} with {where}")


def sign(args: Sequence[Argument]) -> _Signature:
    """The layout that a C compiler gives parameters of these types, behind the header."""
    formats, converters, offsets, sizes = [_HEADER], [], [], []
    end = sizeof(Header)
    for arg in args:
        letter, size, alignment, convert = _parameter(arg)
        padding = -(end - sizeof(Header)) % alignment
        formats.append(f"{padding}x{letter}")
        offsets.append(end + padding)
        sizes.append(size)
        converters.append(convert)
        end += padding + size
    array = (c_uint32 * max(1, len(offsets)))(*offsets)
    return _Signature(
        record=struct.Struct("".join(formats)),
        convert=tuple(converters),
        offsets=array,
        offsets_address=ctypes.addressof(array),
        sizes=tuple(sizes),
        first_tensor=next((i for i, arg in enumerate(args) if isinstance(arg, Tensor)), None),
    )


_SCALARS = {
    "?": "?",
    "b": "b",
    "B": "B",
    "h": "h",
    "H": "H",
    "i": "i",
    "I": "I",
    "l": "q",
    "L": "Q",
    "q": "q",
    "Q": "Q",
}
_SCALARS |= {"f": "f", "d": "d", "P": "P"}


def _parameter(arg: Argument) -> tuple[str, int, int, Callable[[Any], Any]]:
    """(format, bytes, alignment, conversion to what struct packs)."""
    if isinstance(arg, Tensor):
        return "P", 8, 8, Tensor.data_ptr
    if arg is None:
        return "P", 8, 8, _null
    if isinstance(arg, Structure):
        size = sizeof(arg)
        return f"{size}s", size, getattr(arg, "alignment", ctypes.alignment(arg)), bytes
    if isinstance(arg, _SimpleCData):
        letter = _SCALARS[str(getattr(type(arg), "_type_"))]  # noqa: B009
        if letter == "P":
            return "P", 8, 8, _pointer_value
        return letter, sizeof(arg), sizeof(arg), operator.attrgetter("value")
    raise TypeError(f"a kernel takes tensors, None, ctypes scalars and structures, not {type(arg).__name__} {arg!r}")


def _null(arg: None) -> int:
    return 0


def _pointer_value(arg: ctypes.c_void_p) -> int:
    return arg.value or 0
