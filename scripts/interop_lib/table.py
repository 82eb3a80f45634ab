"""The table in README.md: written between two comments, row by row from the results of a run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from interop_lib.cases import Case
from interop_lib.compare import Outcome, Row
from interop_lib.environments import ENVIRONMENTS

BEGIN, END = "<!-- interop table: ./scripts/interop --write-table -->", "<!-- end of the interop table -->"
HEAD = ["| library | format | ours there | theirs here | note |", "|---|---|---|---|---|"]
LIBRARY_PACKAGES = {"optimum": ("gptqmodel", "2.3.0"), "llm-compressor": ("llmcompressor", None)}


def write_table(readme: Path, rows: list[Row]) -> None:
    """Put the rows into the table, in place of those of the same libraries."""
    text = readme.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    run = {row.case.library for row in rows}
    kept = [line for line in table_lines(text) if library_of(line) not in run]
    lines = [*HEAD, *sorted([*kept, *map(_line, rows)], key=_library_order)]
    readme.write_text(f"{text[:start]}\n" + "\n".join(lines) + f"\n{text[end:]}")


def table_lines(text: str) -> list[str]:
    """The rows that a README has now, without the head."""
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()
    return [line for line in lines if line not in HEAD]


def library_of(line: str) -> str:
    """The name in a row, without the version."""
    return line.split("|")[1].split()[0]


def title(case: Case) -> str:
    """Library and release, and where that is not its own environment, the release of what carries it."""
    if case.environment == "development":
        return f"{case.library} {version(case.library)}"
    package, known = LIBRARY_PACKAGES.get(case.library, (case.library, None))
    if case.library == "transformers":
        known = version("transformers")
    environment = ENVIRONMENTS.get(package) or ENVIRONMENTS[case.environment]
    return f"{case.library} {known or environment.version}"


def _library_order(line: str) -> str:
    return library_of(line)


def _line(row: Row) -> str:
    notes = [row.case.note, *(reason for _, reason in row.case.broken.values())]
    cells = [title(row.case), row.case.name, _cell(row, "ours"), _cell(row, "theirs"), "; ".join(filter(None, notes))]
    return "| " + " | ".join(cells) + " |"


def _cell(row: Row, way: str) -> str:
    outcome: Outcome | None = getattr(row, way)
    if outcome is None:
        return "–"
    if way in row.case.broken:
        return "no"
    if not outcome.is_same(row.case.tolerance):
        return "**differs**" if outcome.error is None else "**fails**"
    found = ["loads"] if outcome.equal is None else [f"{outcome.equal}/{outcome.layers}"]
    return ", ".join(found if outcome.logits is None else [*found, f"{outcome.logits:.0e}"])
