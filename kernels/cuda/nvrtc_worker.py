"""Compiles one CUDA source with NVRTC, as a process of its own: a compiler that crashes takes nothing along.

Run as a file, with the standard library alone. Reads a JSON job on standard input:
    library, preload [paths], name, source, options [strings], output (a path)
and writes {"error": str | null, "log": str} to standard output; the cubin goes to `output`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path


class Nvrtc:
    """The few functions of the library that a compilation needs."""

    def __init__(self, library: str, preload: list[str]) -> None:
        for path in preload:  # libnvrtc opens its builtins by bare name, which the loader must already know
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = c_char_p
        self._library.nvrtcGetErrorString.argtypes = [c_int]

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns nvrtcResult; RuntimeError tells the failure."""
        function = getattr(self._library, name)
        function.restype = c_int
        if result := function(*arguments):
            raise RuntimeError(f"{name}: {self._library.nvrtcGetErrorString(result).decode()}")

    def read(self, stem: str, program: c_void_p) -> bytes:
        """What nvrtcGet<stem> gives."""
        size = c_size_t()
        self.call(f"nvrtcGet{stem}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{stem}", program, text)
        return text.raw


def compile_job(job: dict[str, object]) -> dict[str, str | None]:
    """Compile, write the cubin, and tell the error and the log."""
    nvrtc = Nvrtc(str(job["library"]), list(job["preload"]))  # type: ignore[call-overload]
    program, text, name = c_void_p(), str(job["source"]).encode(), str(job["name"]).encode()
    nvrtc.call("nvrtcCreateProgram", byref(program), c_char_p(text), c_char_p(name), c_int(0), None, None)
    options = [option.encode() for option in job["options"]]  # type: ignore[attr-defined]
    array = (c_char_p * len(options))(*options)
    error: str | None = None
    try:
        nvrtc.call("nvrtcCompileProgram", program, c_int(len(options)), ctypes.cast(array, POINTER(c_char_p)))
    except RuntimeError as failure:
        error = str(failure)
    log = nvrtc.read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
    if error is None:
        Path(str(job["output"])).write_bytes(nvrtc.read("CUBIN", program))
    return {"error": error, "log": log}


if __name__ == "__main__":
    json.dump(compile_job(json.load(sys.stdin)), sys.stdout)
