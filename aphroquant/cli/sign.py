"""aphroquant sign: sign an output, so that others can see whose it is."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", metavar="DIR_OR_FILE")
@click.option(
    "--private-key",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An elliptic curve key in PEM.",
)
@click.option("--password", envvar="APHROQUANT_KEY_PASSWORD", metavar="WORD", help="Of the key, if it has one.")
def command(path: str, private_key: Path, password: str | None) -> None:
    """Sign the files of DIR_OR_FILE: model.sig in the directory, FILE.sig beside a file.

    It is a signature of the OpenSSF's model-signing (pip install 'aphroquant[sign]'), which its own command line
    verifies too. Sign last: recording an evaluation changes files.
    """
    from aphroquant.provenance.signing import sign

    click.echo(f"wrote {sign(path, private_key, password=password)}")
