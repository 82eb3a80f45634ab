"""Compares what we read and write with outside libraries, each in an environment of its own.

    ./scripts/interop                 every library
    ./scripts/interop LIBRARY ...     these
    ./scripts/interop --write-table   and put the results of this run into README.md's table
    ./scripts/interop --list          names of the libraries
    ./scripts/interop LIBRARY --checkpoint PATH     load a checkpoint of your own there, and compare

Theirs -> ours: the library quantizes and saves a tiny random Llama, and we load it. Ours -> theirs: the library loads
what `aphroquant convert` wrote, unchanged. Both ways every weight as the library computes it must be ours bit for bit,
and the logits of the library's own forward must agree with our float32 ones. Progress goes to stderr; the last line on
stdout is JSON. The exit code is 4 if anything differs. Environments are made once, in ~/.cache/aphroquant/interop or
$APHROQUANT_CACHE/interop.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from interop_lib.cases import CASES, Case, case_of_checkpoint
from interop_lib.compare import Row, run_cases
from interop_lib.ours import ROOT
from interop_lib.table import write_table

EXIT_DIFFERENT = 4


def main() -> int:
    libraries = list(dict.fromkeys(case.library for case in CASES))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(libraries)}; default: all")
    parser.add_argument("--checkpoint", type=Path, help="load this one in the libraries, and nothing else")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--write-table", action="store_true", help="put the results into README.md")
    parser.add_argument("--list", action="store_true", help="print the names of the libraries, and stop")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work here, and keep what the workers said")
    options = parser.parse_args()
    if options.list:
        print("\n".join(libraries))
        return 0
    if options.write_table and (options.case or options.checkpoint):
        parser.error("--write-table replaces all rows of a library, so it does not go with --case or --checkpoint")
    unknown = set(options.libraries) - set(libraries)
    if unknown:
        parser.error(f"unknown library {min(unknown)!r}; there are {', '.join(libraries)}")
    chosen = [case for case in CASES if case.library in (options.libraries or libraries)]
    chosen = [case for case in chosen if options.case is None or options.case in case.name]
    if options.checkpoint:
        if len(options.libraries) != 1 or not any(case.ours for case in chosen):
            parser.error("--checkpoint goes with one library that loads checkpoints")
        chosen = [case_of_checkpoint(options.libraries[0], options.checkpoint)]
    with tempfile.TemporaryDirectory(prefix="aphroquant-interop-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for _, group in groupby(sorted(chosen, key=_process), key=_process):
            rows += [_shown(row) for row in run_cases(list(group), folder.resolve())]
    if options.write_table:
        write_table(ROOT / "README.md", rows)
    print(json.dumps({"results": [row.to_json() for row in rows]}))
    return 0 if all(row.passed for row in rows) else EXIT_DIFFERENT


def _process(case: Case) -> tuple[str, str, str]:
    """Cases with the same answer are asked in one process."""
    return case.library, case.environment, case.worker


def _shown(row: Row) -> Row:
    verdict = "passed" if row.passed else "FAILED"
    print(f"{row.case.library:16} {row.case.name:32} {verdict}", file=sys.stderr)
    for way in ("ours", "theirs"):
        outcome = getattr(row, way)
        if outcome is not None:
            print(f"    {way:7} {outcome}", file=sys.stderr)
    return row


if __name__ == "__main__":
    sys.exit(main())
