"""The few functions of the CUDA driver that load kernels and describe them, through ctypes.

Launching, which must be quick, is in native/launcher.cpp.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache

from aphroquant.errors import AphroquantError

_SUCCESS, _RELAXED_CAPTURE = 0, 2
_MAX_SHARED_OPTIN, _CAPABILITY_MAJOR = 97, 75  # CU_DEVICE_ATTRIBUTE_...
_STATIC_SHARED, _LOCAL_BYTES, _NUM_REGISTERS = 1, 3, 4  # CU_FUNC_ATTRIBUTE_...
_MAX_THREADS, _MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 0, 8, 14


class CudaError(AphroquantError):
    """The driver refused something."""


@cache
def driver() -> CDLL:
    """The driver's library, initialized."""
    library = CDLL("libcuda.so.1")
    library.cuGetErrorName.argtypes = library.cuGetErrorString.argtypes = [c_int, ctypes.POINTER(c_char_p)]
    check(library.cuInit(0), "cuInit", library)
    return library


def check(result: int, what: str, library: CDLL | None = None) -> None:
    """CudaError unless `result` is success."""
    if result == _SUCCESS:
        return
    loaded = library or driver()
    name, meaning = c_char_p(), c_char_p()
    loaded.cuGetErrorName(result, byref(name))
    loaded.cuGetErrorString(result, byref(meaning))
    said = f"{(name.value or b'unknown').decode()}, {(meaning.value or b'no description').decode()}"
    raise CudaError(f"{what} failed with CUDA error {result} ({said})", hint=_HINTS.get(result))


_OLD_DRIVER = (
    "the driver is older than the compiler: update the driver, or install the NVRTC package of its CUDA version"
)
_BAD_ADDRESS = "a kernel read or wrote where it must not: restart the process; CUDA_LAUNCH_BLOCKING=1 shows which one"
_HINTS = {
    209: "the kernel was compiled for another GPU: run `aphroquant doctor`",
    218: _OLD_DRIVER,
    222: _OLD_DRIVER,
    700: _BAD_ADDRESS,
    719: _BAD_ADDRESS,
}


@dataclass(frozen=True)
class LoadedFunction:
    """A kernel on one device. `parameters` are (offset, size) of each, or None where the driver is too old to tell."""

    handle: int
    context: int
    capability_major: int
    parameters: tuple[tuple[int, int], ...] | None
    registers: int
    local_bytes: int
    static_shared: int
    max_dynamic_shared: int
    max_threads: int


def load_function(cubin: bytes, entry: str, device: int) -> LoadedFunction:
    """Load a kernel into the device's primary context, which torch uses. Safe while a graph is captured."""
    cuda = driver()
    context = _primary_context(device)
    mode = c_int(_RELAXED_CAPTURE)
    check(cuda.cuThreadExchangeStreamCaptureMode(byref(mode)), "cuThreadExchangeStreamCaptureMode")
    check(cuda.cuCtxPushCurrent_v2(c_void_p(context)), "cuCtxPushCurrent")
    try:
        module, function = c_void_p(), c_void_p()
        check(cuda.cuModuleLoadData(byref(module), cubin), f"loading the kernel {entry}")
        check(cuda.cuModuleGetFunction(byref(function), module, entry.encode()), f"finding the kernel {entry}")
        return _describe(function, context, device)
    finally:
        cuda.cuCtxPopCurrent_v2(byref(c_void_p()))
        cuda.cuThreadExchangeStreamCaptureMode(byref(mode))


def device_attribute(attribute: int, device: int) -> int:
    """cuDeviceGetAttribute."""
    value = c_int()
    check(driver().cuDeviceGetAttribute(byref(value), attribute, device), f"attribute {attribute} of GPU {device}")
    return value.value


def _describe(function: c_void_p, context: int, device: int) -> LoadedFunction:
    major, shared_limit = device_attribute(_CAPABILITY_MAJOR, device), device_attribute(_MAX_SHARED_OPTIN, device)
    static_shared = _function_attribute(function, _STATIC_SHARED)
    max_dynamic = shared_limit - static_shared
    _set_function_attribute(function, _MAX_DYNAMIC_SHARED, max_dynamic)
    if major >= 9:
        _set_function_attribute(function, _NON_PORTABLE_CLUSTER, 1)
    assert function.value is not None
    return LoadedFunction(
        handle=function.value,
        context=context,
        capability_major=major,
        parameters=_parameters(function),
        registers=_function_attribute(function, _NUM_REGISTERS),
        local_bytes=_function_attribute(function, _LOCAL_BYTES),
        static_shared=static_shared,
        max_dynamic_shared=max_dynamic,
        max_threads=_function_attribute(function, _MAX_THREADS),
    )


@cache
def _primary_context(device: int) -> int:
    """Retained for the life of the process, as torch does."""
    handle, context = c_int(), c_void_p()
    check(driver().cuDeviceGet(byref(handle), device), f"finding GPU {device}")
    check(driver().cuDevicePrimaryCtxRetain(byref(context), handle), f"the context of GPU {device}")
    assert context.value is not None
    return context.value


def _parameters(function: c_void_p) -> tuple[tuple[int, int], ...] | None:
    """Known since CUDA 12.4."""
    cuda = driver()
    if not hasattr(cuda, "cuFuncGetParamInfo"):
        return None
    found: list[tuple[int, int]] = []
    offset, size = c_size_t(), c_size_t()
    while cuda.cuFuncGetParamInfo(function, c_size_t(len(found)), byref(offset), byref(size)) == _SUCCESS:
        found.append((offset.value, size.value))
    return tuple(found)


def _function_attribute(function: c_void_p, attribute: int) -> int:
    value = c_int()
    check(driver().cuFuncGetAttribute(byref(value), attribute, function), f"attribute {attribute} of a kernel")
    return value.value


def _set_function_attribute(function: c_void_p, attribute: int, value: int) -> None:
    check(driver().cuFuncSetAttribute(function, attribute, value), f"attribute {attribute} of a kernel")
