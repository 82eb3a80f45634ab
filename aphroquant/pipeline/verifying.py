"""An output read back from the disk: its bytes are those that were written, and its numbers make sense."""

from __future__ import annotations

from pathlib import Path

from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.errors import GateError
from aphroquant.inspection.verify import verify
from aphroquant.provenance.verification import verify_files


def verify_output(place: Path) -> str:
    """What was found, in words. GateError for a file that is not what was written, or numbers that cannot be meant."""
    files = verify_files(place)
    if not files.passed:
        first = files.differences[0]
        raise GateError(f"{place}: {first.file} is not what was written: {first.message}")
    numbers = verify(open_checkpoint(place))
    if not numbers.passed:
        first_error = next(finding for finding in numbers.findings if finding.severity == "error")
        raise GateError(f"{place}: {first_error.message}", hint=f"aphroquant inspect {place} --verify tells more")
    num_files = f"{files.num_files} file{'' if files.num_files == 1 else 's'}"
    told = f"{num_files}, {size_text(files.num_bytes)} as written; {numbers.num_tensors} tensors sound"
    doubts = [finding for finding in numbers.findings if finding.severity == "warning"]
    if not doubts:
        return told
    count = "a warning" if len(doubts) == 1 else f"{len(doubts)} warnings, the first"
    return f"{told}; {count} of {doubts[0].subject}: {doubts[0].message}"
