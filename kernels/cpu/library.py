"""Finding and loading the compiled library.

The build puts it into aphroquant/_lib: in a wheel inside the installed package, in an editable install into
site-packages, beside no sources. The instruction set is the best that the processor has; APHROQUANT_CPU_ISA
(avx512, avx2, baseline) chooses a lesser one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from ctypes import CDLL
from functools import cache
from pathlib import Path

import aphroquant
from aphroquant.errors import UsageError
from aphroquant.kernels.cpu.abi import ABI_VERSION, signatures

FILE_NAME = "libaphroquant_cpu.so"


class LibraryUnavailableError(Exception):
    """The compiled library cannot be used; the message says why."""


@cache
def library() -> CDLL:
    """The loaded library. Raises LibraryUnavailableError."""
    path = _find()
    try:
        loaded = CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailableError(f"{path} cannot be loaded: {error}") from error
    version = loaded.aq_abi_version()
    if version != ABI_VERSION:
        raise LibraryUnavailableError(f"{path} was built from other sources (interface {version}, not {ABI_VERSION})")
    for name, (result, arguments) in signatures().items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.aq_instruction_sets.restype = ctypes.c_char_p
    loaded.aq_select.argtypes = [ctypes.c_char_p]
    if wanted := os.environ.get("APHROQUANT_CPU_ISA"):
        _select(loaded, wanted)
    return loaded


@cache
def obstacle() -> str | None:
    """Why the library cannot be used, or None."""
    try:
        library()
    except LibraryUnavailableError as error:
        return str(error)
    return None


def compiled_file() -> Path | None:
    """Where the compiled library is; None if there is none."""
    return next((path for path in _candidates() if path.is_file()), None)


def instruction_sets() -> list[str]:
    """What was built and runs here, best first."""
    return _names(library())


def select_instruction_set(name: str) -> None:
    """Use one of `instruction_sets` for all later calls. UsageError lists them if it is none."""
    _select(library(), name)


def _select(loaded: CDLL, name: str) -> None:
    if loaded.aq_select(name.encode()) != 0:
        known = ", ".join(_names(loaded))
        raise UsageError(f"APHROQUANT_CPU_ISA = {name!r} must be one of {known} on this processor")


def _names(loaded: CDLL) -> list[str]:
    names: bytes = loaded.aq_instruction_sets()
    return names.decode().split(",")


def _find() -> Path:
    path = compiled_file()
    if path is not None:
        return path
    raise LibraryUnavailableError(
        "the package was installed without the compiled CPU library (no C++ compiler, or no OpenMP)"
    )


def _candidates() -> list[Path]:
    candidates = [Path(folder) / "_lib" / FILE_NAME for folder in aphroquant.__path__]
    try:
        installed = importlib.metadata.distribution("aphroquant").locate_file(f"aphroquant/_lib/{FILE_NAME}")
    except importlib.metadata.PackageNotFoundError:
        return candidates  # run from a source tree that is on sys.path
    return [*candidates, Path(str(installed))]
