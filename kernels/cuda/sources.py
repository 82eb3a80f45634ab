"""The CUDA sources: where they are, what a file includes, and a digest that changes when any of it does."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

SOURCE_ROOT = (Path(__file__).parent / "source").resolve()  # kernels/ is reached through a link in a checkout
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def source_path(name: str) -> Path:
    """The file of a kernel source named relative to `source/`."""
    path = SOURCE_ROOT / name
    if not path.is_file():
        known = ", ".join(sorted(found.relative_to(SOURCE_ROOT).as_posix() for found in SOURCE_ROOT.rglob("*.cu")))
        raise FileNotFoundError(f"there is no kernel source {name!r} in {SOURCE_ROOT}; there are: {known}")
    return path


def included_files(path: Path) -> list[Path]:
    """`path` and every file of ours that it includes, directly or not, in order of first mention."""
    found: list[Path] = []
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.append(current)
        for name in reversed(_INCLUDE.findall(current.read_text(encoding="utf-8"))):
            if included := _resolve(name, current):
                waiting.append(included)
    return found


@cache
def source_digest(name: str) -> str:
    """SHA-256 over a source and what it includes, names too."""
    digest = hashlib.sha256()
    for path in included_files(source_path(name)):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCE_ROOT)}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def _resolve(name: str, includer: Path) -> Path | None:
    """As the compiler looks it up; None for a header that comes with CUDA."""
    for folder in (includer.parent, SOURCE_ROOT):
        path = Path(folder / name)
        if path.is_file():
            return path.parent.resolve() / path.name
    return None
