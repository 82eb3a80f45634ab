"""Markdown table of quality rows that were measured before: `python scripts/bench/quality_table.py FOLDER...`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from quality_rows import Row, read_rows

HEADINGS = (
    "| | bits a weight | mean KLD | p99.9 | top-1 | perplexity | minutes | of processors | peak memory | machine |"
)


def main() -> None:
    if not sys.argv[1:]:
        sys.exit(__doc__)
    print("\n".join(table(read_rows(*map(Path, sys.argv[1:])))))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines; a width begins with a line of its own. The machines are numbered, and named below."""
    machines = list(dict.fromkeys(row.machine for row in rows))
    yield HEADINGS
    yield "|" + "---|" * HEADINGS.count(" | ") + "---|"
    width = None
    for row in rows:
        if row.bits != width:
            width = row.bits
            yield f"| **{_named(width)}** |" + " |" * (HEADINGS.count(" | "))
        yield _line(row, machines.index(row.machine) + 1)
    yield ""
    yield "Machines: " + "; ".join(f"{number} {machine}" for number, machine in enumerate(machines, 1)) + "."


def _named(bits: str) -> str:
    return bits.rstrip("s") + (" bit symmetric" if bits.endswith("s") else " bit")


def _line(row: Row, machine: int) -> str:
    figures = next(iter(row.texts.values()))
    cells = [
        row.name,
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
    return "| " + " | ".join(cells) + " |"


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds / 60:.1f}"


def _memory(row: Row) -> str:
    host = "-" if row.memory_mib is None else f"{row.memory_mib / 1024:.1f} GiB"
    return host if row.gpu_memory_mib is None else f"{host} + {row.gpu_memory_mib / 1024:.1f} GPU"


if __name__ == "__main__":
    main()
