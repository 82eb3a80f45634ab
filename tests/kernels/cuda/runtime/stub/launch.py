"""Launches one kernel on the stub driver. Arguments: native or ctypes, and the function's handle."""

from __future__ import annotations

import sys
from ctypes import c_int8, c_void_p

import torch

from aphroquant.errors import AphroquantError
from aphroquant.kernels.cuda.driver import LoadedFunction
from aphroquant.kernels.cuda.launcher import Argument, Kernel
from aphroquant.kernels.cuda.native_launcher import launch_by_ctypes, native_library
from aphroquant.kernels.cuda.probe.launches import Affine

kind, handle = sys.argv[1], int(sys.argv[2], 16)
torch._C._cuda_getCurrentRawStream = lambda device: 0x57AEA  # type: ignore[attr-defined]
kernel = Kernel("launch_probe.cu", "launch_probe", {"BITS": 4})
if kind == "ctypes":
    kernel._launch = launch_by_ctypes
else:
    assert native_library() is not None
parameters = ((0, 8), (8, 8), (16, 16), (32, 1))
on_cpu = -1  # where a tensor without a GPU says it is
kernel._functions[on_cpu] = LoadedFunction(handle, 0xC0, 9, parameters, 12, 0, 0, 99_000, 1024)
x = torch.zeros(3)
arguments: list[Argument] = [x, None, Affine(7, 2.5, -0.25), c_int8(-3)]
print(f"x is at {x.data_ptr():#x}", flush=True)
try:
    kernel.launch((1, 2, 3), (4, 5, 6), arguments, shared_bytes=7, cluster=(1, 2, 1), programmatic=True)
    kernel.launch((9, 1, 1), (32, 1, 1), arguments)
    kernel.launch((9, 1, 1), (32, 1, 1), [c_void_p(0x10), *arguments[1:], x])
except AphroquantError as error:
    print(f"error: {error} hint: {error.hint}")
