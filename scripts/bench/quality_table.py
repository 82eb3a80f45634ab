"""Markdown table of quality rows that were measured before, here or on other machines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from quality_rows import Row, read_rows

COLUMNS = (
    *("", "release", "bits a weight", "mean KLD", "p99.9", "top-1", "perplexity"),
    *("minutes", "processor minutes", "peak memory", "machine"),
)
BEGIN, END = "<!-- rows of scripts/bench/quality_table.py -->", "<!-- end of the rows -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="of JSON files, as bench_quality --results leaves them")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it into this page, in place of the one there")
    arguments = parser.parse_args()
    lines = "\n".join(table(read_rows(*arguments.folders)))
    if arguments.write is None:
        print(lines)
        return
    page = arguments.write.read_text()
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    arguments.write.write_text(f"{page[:start]}\n{lines}\n{page[end:]}")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines; rows of as many whole bits stand below a line of their own. Machines are numbered, and named below."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    yield _line(COLUMNS)
    yield "|" + "---|" * len(COLUMNS)
    section = None
    for row in rows:
        if section != (section := int(row.bits_per_weight)):
            yield _line([f"**{section} to {section + 1} bits**", *[""] * (len(COLUMNS) - 1)])
        yield _line(_cells(row, machines.index(row.machine) + 1))
    yield ""
    yield "Machines: " + "; ".join(f"{number} {machine}" for number, machine in enumerate(machines, 1)) + "."


def _cells(row: Row, machine: int) -> list[str]:
    figures = next(iter(row.texts.values()))
    return [
        f"`{row.title}`",
        next(iter(row.versions.values()), ""),
        f"{row.bits_per_weight:.2f}",
        f"{figures['mean_kld']:.3f} +- {figures['mean_kld_stderr']:.3f}",
        f"{figures['p999_kld']:.2f}",
        f"{figures['top1_agreement']:.1%}",
        f"{figures['perplexity']:.1f}",
        _minutes(row.seconds),
        _minutes(row.processor_seconds),
        _memory(row),
        str(machine),
    ]


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _memory(row: Row) -> str:
    host = "" if row.memory_mib is None else f"{row.memory_mib / 1024:.1f} GiB"
    return host if row.gpu_memory_mib is None else f"{host}, GPU {row.gpu_memory_mib / 1024:.1f} GiB"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
