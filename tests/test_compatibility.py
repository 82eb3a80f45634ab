"""The table of engines agrees with the table in README.md, which the libraries themselves have filled."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphroquant.compatibility import ENGINES, TABLE, Support, support

README = Path(__file__).parent.parent / "README.md"
TRIED = [entry for entry in TABLE if entry.is_tried]


def readme_rows() -> dict[tuple[str, str], str]:
    """(library, case) -> what became of our checkpoint there."""
    text = README.read_text()
    begin, end = text.index("<!-- interop table"), text.index("<!-- end of the interop table")
    rows = [[cell.strip() for cell in line.split("|")] for line in text[begin:end].splitlines() if line.startswith("|")]
    return {(row[1].split()[0], row[2]): row[3] for row in rows[2:]}


@pytest.mark.parametrize("entry", TRIED, ids=lambda entry: f"{entry.evidence.library} {entry.evidence.case}")
def test_what_was_tried_is_what_the_readme_says(entry: Support) -> None:
    cell = readme_rows()[entry.evidence]  # type: ignore[index]
    assert (cell == "no") is not entry.loads
    assert cell not in ("–", "**differs**", "**fails**")


def test_everything_else_has_an_address() -> None:
    for entry in TABLE:
        assert entry.engine in ENGINES
        assert entry.is_tried or str(entry.evidence).startswith("https://")


def engines(format: str, *schemes: str) -> list[str]:
    return [entry.engine for entry in support(format, schemes)]


def test_an_engine_has_to_load_every_layer() -> None:
    assert "vllm" in engines("gptq", "int4 sym g128")
    assert "vllm" not in engines("gptq", "int4 asym g128")  # tried, and refused
    assert "vllm" not in engines("gptq", "int4 sym g128", "int3 sym g128")
    assert engines("gptq", "int4 sym g128 act-order") == ["aphroquant"]
    assert engines("exl3", "trellis 3-bit mcg") == ["aphroquant"]


def test_what_was_tried_counts_before_what_is_documented() -> None:
    found = {entry.engine: entry for entry in support("gptq", ["int4 sym g32"])}
    assert found["vllm"].is_tried
    assert not found["sglang"].is_tried
    mixed = {entry.engine: entry for entry in support("gptq", ["int4 sym g32", "int8 sym g32"])}
    assert not mixed["vllm"].is_tried  # as sure as the layer that is least sure
