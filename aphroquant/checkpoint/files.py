"""Opening files that may be anything: pipes, devices and endless ones are refused before a byte is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from aphroquant.errors import InputError, is_out_of_memory

MAX_JSON_BYTES = 2**26  # of a config or an index, which is parsed in memory
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")  # torch.save: protocol 2, and since 1.6 in a zip archive


@contextmanager
def opened(path: Path) -> Iterator[tuple[FileIO, int]]:
    """An ordinary file, unbuffered, and its size. InputError naming it for all others, and for what fails inside."""
    try:
        # A pipe without a writer must not be waited for.
        with FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path}: is {_kind(found.st_mode)}, not a file")
            yield file, found.st_size
    except OSError as error:
        if is_out_of_memory(error):  # while the file is mapped
            raise
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path}: is a link to {path.readlink()}, which is not there",
                hint="the download is incomplete, or the linked file was moved",
            ) from error
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL
        raise InputError(f"{path}: cannot be read: {error}") from error


def read_small(path: Path) -> bytes:
    """All bytes of a file that is parsed in memory."""
    with opened(path) as (file, size):
        if size > MAX_JSON_BYTES:
            raise InputError(f"{path}: is {size} bytes long; at most {MAX_JSON_BYTES} are read")
        content: bytes = file.read(size)
        return content


def check_ordinary(path: Path) -> None:
    """Refuse what a library that opens it would wait for, or read for ever. A missing file is none of these."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is {_kind(path.stat().st_mode)}, not a file")


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so, and is not what it should be, is one: torch.save's, or in a zip archive."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in _PICKLE_PROTOCOLS)


def pickle_error(path: Path) -> InputError:
    return InputError(
        f"{path}: is a pickle, which can run code when loaded and is not read",
        hint="save the model again as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something special")
