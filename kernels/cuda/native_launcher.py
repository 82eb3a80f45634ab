"""The call that launches: the compiled library, or the same in ctypes, several times slower, where it was not built."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable
from ctypes import CDLL, POINTER, Structure, Union, byref, c_char, c_char_p, c_int32, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import aphroquant
from aphroquant.kernels.cuda.driver import driver

FILE_NAME = "libaphroquant_cuda_launcher.so"
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6

Launch = Callable[[bytes], int]  # takes a record (launcher.HEADER and the parameters), gives the driver's result


class Header(Structure):
    """What a record starts with; `Launch` in native/launcher.cpp."""

    _fields_ = (
        ("function", c_void_p),
        ("context", c_void_p),
        ("stream", c_void_p),
        ("offsets", POINTER(c_uint32)),
        ("num_parameters", c_uint32),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("cluster", c_uint32 * 3),
        ("shared_bytes", c_uint32),
        ("programmatic", c_uint32),
    )


@cache
def native_library() -> CDLL | None:
    """The compiled launcher; None if it was not built, or from other sources."""
    for path in _candidates():
        if path.is_file():
            library = CDLL(str(path))
            library.aq_launch_header_size.restype = c_uint32
            if library.aq_launch_header_size() == ctypes.sizeof(Header):
                library.aq_launch.argtypes = [c_char_p]
                return library
    return None


@cache
def launch_function() -> Launch:
    """The quickest that there is."""
    library = native_library()
    return launch_by_ctypes if library is None else library.aq_launch


def _candidates() -> list[Path]:
    candidates = [Path(folder) / "_lib" / FILE_NAME for folder in aphroquant.__path__]
    try:
        installed = importlib.metadata.distribution("aphroquant").locate_file(f"aphroquant/_lib/{FILE_NAME}")
    except importlib.metadata.PackageNotFoundError:
        return candidates  # run from a source tree that is on sys.path
    return [*candidates, Path(str(installed))]


class _Value(Union):
    _fields_ = (("dimensions", c_uint32 * 3), ("flag", c_int32), ("bytes", c_char * 64))


class _Attribute(Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_uint32), ("padding", c_uint32), ("value", _Value))


class _Config(Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared_bytes", c_uint32),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("num_attributes", c_uint32),
    )


def launch_by_ctypes(record: bytes) -> int:
    """What aq_launch does."""
    header = Header.from_buffer_copy(record)
    start = ctypes.cast(c_char_p(record), c_void_p).value or 0
    addresses = [start + header.offsets[i] for i in range(header.num_parameters)]
    parameters = (c_void_p * max(1, len(addresses)))(*addresses)
    attributes = (_Attribute * 2)()
    config = _Config(header.grid, header.block, header.shared_bytes, header.stream, attributes, 0)
    if header.cluster[0]:
        attributes[config.num_attributes].id = _CLUSTER_DIMENSION
        attributes[config.num_attributes].value.dimensions = header.cluster
        config.num_attributes += 1
    if header.programmatic:
        attributes[config.num_attributes].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[config.num_attributes].value.flag = 1
        config.num_attributes += 1
    cuda = driver()
    if result := cuda.cuCtxPushCurrent_v2(c_void_p(header.context)):
        return int(result)
    result = cuda.cuLaunchKernelEx(byref(config), c_void_p(header.function), parameters, None)
    cuda.cuCtxPopCurrent_v2(byref(c_void_p()))
    return int(result)
