"""aphroquant verify: whether the files of an output are those that were written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aphroquant.cli.byte_progress import stage_progress
from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.errors import GateError, one_line

if TYPE_CHECKING:
    from aphroquant.provenance.verification import FileDifference, FileVerification

_MAX_TENSORS = 20  # told of one file; --json has all


@click.command()
@click.argument("path", metavar="DIR_OR_FILE")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Check the signature too: by the owner of this key, of these files.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write what was found here too; - for standard output.")
def command(path: str, public_key: Path | None, json_file: str | None) -> None:
    """Hash the files of DIR_OR_FILE again, and say what differs from aphroquant.json and SHA256SUMS.

    Told are files that are missing, changed (and which of their tensors) or of no record. Exit code 4 if there are any.
    To check the numbers in a checkpoint, of whatever origin: aphroquant inspect --verify.
    """
    check_json_target(json_file)
    from aphroquant.provenance.verification import verify_files

    with stage_progress("hashing", "MB", 1e6) as on_progress:
        found = verify_files(path, on_progress)
    problem = None if public_key is None else _signature_problem(path, public_key)
    if json_file != STANDARD_OUTPUT:
        click.echo("\n".join([*_told(found), *_told_of_signature(public_key, problem)]))
    if json_file is not None:
        signature = {} if public_key is None else {"signature": {"valid": problem is None, "problem": problem}}
        write_json(json_file, found.to_dict() | signature)
    if not found.passed:
        count = len(found.differences)
        raise GateError(f"{path}: {count} file{' is' if count == 1 else 's are'} not as recorded")
    if problem is not None:
        raise GateError(problem)


def difference_lines(differences: Sequence[FileDifference]) -> list[str]:
    """What differs, one file a line, and its tensors below it."""
    lines = []
    for difference in differences:
        lines.append(f"{difference.kind:<8}  {one_line(difference.file)}: {one_line(difference.message)}")
        lines += [f"{'':<8}  tensor {one_line(name)}" for name in difference.tensors[:_MAX_TENSORS]]
        if len(difference.tensors) > _MAX_TENSORS:
            lines.append(f"{'':<8}  and {len(difference.tensors) - _MAX_TENSORS} more tensors")
    return lines


def _signature_problem(path: str, public_key: Path) -> str | None:
    from aphroquant.provenance.signing import check_signature

    try:
        check_signature(path, public_key)
    except GateError as error:
        return error.message
    return None


def _told(found: FileVerification) -> list[str]:
    count = len(found.differences)
    verdict = "all as recorded" if found.passed else f"{count} difference{'' if count == 1 else 's'}"
    line = f"hashed {found.num_files} files, {found.num_bytes / 1e6:.2f} MB: {verdict}"
    return [*difference_lines(found.differences), line]


def _told_of_signature(public_key: Path | None, problem: str | None) -> list[str]:
    if public_key is None:
        return []
    return [f"signature: {'by the owner of ' + str(public_key) if problem is None else problem}"]
