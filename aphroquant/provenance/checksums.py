"""SHA256SUMS: the hashes of a directory's files, as coreutils' `sha256sum -c` checks them.

A line is the hash, two blanks and the name. A name with a backslash or the end of a line in it is escaped, and the line
begins with a backslash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from aphroquant.checkpoint.files import read_small
from aphroquant.errors import InputError

FILE_NAME = "SHA256SUMS"
FILE_SUFFIX = ".sha256"  # beside a single file
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = re.compile(r"\\(.?)", re.DOTALL)


def sums_text(hashes: Mapping[str, str]) -> str:
    """The file's content, from SHA-256 by name."""
    return "".join(map(_line, sorted(hashes.items())))


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 by name. InputError naming the line that is none, or that names a file outside the directory."""
    try:
        text = read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None:
            raise InputError(
                f"{path}: line {number} is no SHA-256 and a file name: {line[:100]!r}",
                hint="write it as sha256sum does: 64 hexadecimal digits, two blanks, the name",
            )
        name = _unescaped(match[3]) if match[1] else match[3]
        check_name(path, name)
        if found.get(name, match[2].lower()) != match[2].lower():
            raise InputError(f"{path}: gives two hashes for {name}")
        found[name] = match[2].lower()
    return found


def check_name(path: Path, name: object) -> None:
    """InputError unless a name in `path` is that of a file in its directory, or in a folder of it."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or parts[0] == "/" or "\0" in str(name):
        raise InputError(f"{path}: {str(name)[:100]!r} is no name of a file beside it")


def _line(entry: tuple[str, str]) -> str:
    name, sha256 = entry
    escaped = "".join(_ESCAPES.get(char, char) for char in name)
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def _unescaped(name: str) -> str:
    plain = {escaped[1]: char for char, escaped in _ESCAPES.items()}
    return _ESCAPED.sub(lambda match: plain.get(match[1], match[0]), name)
