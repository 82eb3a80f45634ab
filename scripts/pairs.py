#!/usr/bin/env python3
"""Writes formats/README.md: which quantized checkpoints become which other format without loss, as `convert` does it.

    ./scripts/pairs.py             tries every pair on tiny checkpoints and writes the page
    ./scripts/pairs.py --check     the same, and fails (exit code 1) if the page on disk says something else

Each source is a model of one block whose weights are random numbers of one scheme. A pair is lossless if `convert` says
so, having compared every layer; else its refusal is the reason that the page gives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "formats" / "README.md"
sys.path.insert(0, str(ROOT / "scripts"))

from conversion_pairs.page import render  # noqa: E402
from conversion_pairs.pairs import measure  # noqa: E402
from conversion_pairs.shapes import measure_sizes  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory(prefix="aphroquant-pairs-") as folder:
        text = render(measure(Path(folder)), measure_sizes())
    if check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE}: {'up to date' if same else 'out of date: run ./scripts/pairs.py'}")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
