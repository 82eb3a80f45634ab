"""aphroquant reproduce: run a recorded conversion again and compare the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from aphroquant.cli.convert import conversion_progress, removing_on_sigterm
from aphroquant.cli.json_report import STANDARD_OUTPUT, check_json_target, write_json
from aphroquant.cli.verify import difference_lines
from aphroquant.errors import GateError

if TYPE_CHECKING:
    from aphroquant.provenance.reproduction import Reproduction


@click.command()
@click.argument("path", metavar="DIR_OR_FILE")
@click.option("--source", metavar="SOURCE", help="Where the source is now. Default: where it was.")
@click.option(
    "--calibration",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the calibration texts are now, in their order; repeatable. Default: where they were.",
)
@click.option("--any-versions", is_flag=True, help="Try it with other versions or hardware, which may change bytes.")
@click.option(
    "--work",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    metavar="DIR",
    help="Where to make it again. Default: the system's temporary directory.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write what was found here too; - for standard output.")
def command(
    path: str,
    source: str | None,
    calibration: tuple[Path, ...],
    any_versions: bool,
    work: Path | None,
    json_file: str | None,
) -> None:
    """Convert again as aphroquant.json of DIR_OR_FILE says, elsewhere, and compare every byte.

    Exit code 0: the same; 4: something differs; 3: it cannot be made again, because the source or the calibration text
    is gone or another one, or because versions or hardware differ. Time stamps, durations, metrics and the model card
    are not compared.
    """
    check_json_target(json_file)
    from aphroquant.provenance.reproduction import reproduce

    with removing_on_sigterm(), conversion_progress() as progress:
        found = reproduce(
            path, source=source, calibration=calibration, any_versions=any_versions, work=work, progress=progress
        )
    if json_file != STANDARD_OUTPUT:
        click.echo(_told(found))
    if json_file is not None:
        write_json(json_file, found.to_dict())
    if not found.is_same:
        raise GateError(f"{path}: was not reproduced: {len(found.differences)} differences")


def _told(found: Reproduction) -> str:
    from aphroquant.provenance.reproduction import NOT_COMPARED

    lines = [f"other     {change}" for change in found.changes]
    lines += difference_lines(found.differences)
    verdict = "byte for byte the same" if found.is_same else f"{len(found.differences)} differences"
    lines += [
        f"made {found.num_files} files again in {found.seconds:.1f} s: {verdict}",
        f"not compared: {NOT_COMPARED}",
    ]
    return "\n".join(lines)
