"""README.md's table names the cases that `./scripts/interop` runs, and is written from their results."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from aphroquant.conversion import convert

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def interop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`interop("table")`: a module of the script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"interop_lib.{name}")


def test_every_row_is_a_case_and_every_case_a_row(interop: Any) -> None:
    lines = interop("table").table_lines((ROOT / "README.md").read_text())
    rows = {(line.split("|")[1].split()[0], line.split("|")[2].strip()) for line in lines}
    assert rows == {(case.library, case.name) for case in interop("cases").CASES}


def test_nothing_in_the_table_differs(interop: Any) -> None:
    lines = interop("table").table_lines((ROOT / "README.md").read_text())
    assert not [line for line in lines if "**" in line]


def test_every_case_has_an_environment_and_a_worker(interop: Any) -> None:
    for case in interop("cases").CASES:
        assert case.environment == "development" or case.environment in interop("environments").ENVIRONMENTS
        assert (ROOT / "tests" / "interop" / "workers" / f"{case.worker}.py").exists()
        assert case.saves or case.ours is not None, f"{case.library} {case.name} compares nothing"


@pytest.mark.parametrize(
    ("library", "to", "environment", "weights"),
    [
        ("transformers", "gptq", "gptqmodel", "unseen"),
        ("transformers", "awq", "gptqmodel", "unseen"),
        ("transformers", "compressed-tensors", "development", "plain"),
        ("transformers", "bitsandbytes", "development", "dequantize"),
        ("transformers", "hqq", "development", "dequantize"),  # no case of it loads ours: as the first
        ("autoawq", "awq", "autoawq", None),
    ],
)
def test_a_checkpoint_is_loaded_as_the_library_s_case_of_its_format_is(
    library: str, to: str, environment: str, weights: str | None, interop: Any, tiny_checkpoint: Any, tmp_path: Path
) -> None:
    options = {} if to == "bitsandbytes" else {"solver": "rtn", "samples": 0}
    convert(tiny_checkpoint("llama"), to=to, out=tmp_path / "out", **options)
    case = interop("cases").case_of_checkpoint(library, tmp_path / "out")
    assert (case.environment, case.settings.get("weights")) == (environment, weights)
    assert not case.saves
    assert (case.rounding > 0) == (to == "bitsandbytes")  # LLM.int8


def test_names_of_cases_differ(interop: Any) -> None:
    names = [(case.library, case.name) for case in interop("cases").CASES]
    assert len(set(names)) == len(names)


def test_rows_of_libraries_that_were_not_run_stay(interop: Any, tmp_path: Path) -> None:
    table, cases, compare = interop("table"), interop("cases"), interop("compare")
    text = f"before\n{table.BEGIN}\n" + "\n".join(table.HEAD)
    text += f"\n| autoawq 0 | AWQ | old | old |  |\n| hqq 0 | gone | old | old |  |\n{table.END}\nafter\n"
    (tmp_path / "README.md").write_text(text)
    case = next(case for case in cases.CASES if case.library == "hqq")
    row = compare.Row(case, compare.Outcome(None, 14, 14, 2e-6), None)
    table.write_table(tmp_path / "README.md", [row])
    lines = table.table_lines((tmp_path / "README.md").read_text())
    assert lines[0] == "| autoawq 0 | AWQ | old | old |  |"
    assert re.fullmatch(r"\| hqq [\d.a-z]+ \| HQQ 8 bit \| 14/14, 2e-06 \| – \|  \|", lines[1])
    assert (tmp_path / "README.md").read_text().startswith("before\n")
    assert (tmp_path / "README.md").read_text().endswith("\nafter\n")


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"equal": 13}, False),
        ({"equal": None}, True),
        ({"logits": 2e-5}, False),
        ({"logits": float("nan")}, False),
        ({"layers": 0, "equal": 0}, False),
        ({"error": "it does not load"}, False),
    ],
)
def test_an_outcome_is_the_same_only_if_all_of_it_is(changes: dict[str, Any], same: bool, interop: Any) -> None:
    fields = {"error": None, "equal": 14, "layers": 14, "logits": 1e-6, **changes}
    assert interop("compare").Outcome(**fields).is_same(1e-5) is same


def test_a_case_that_is_broken_there_fails_once_it_works(interop: Any) -> None:
    cases, compare = interop("cases"), interop("compare")
    case = next(case for case in cases.CASES if case.broken)
    (way,) = case.broken
    said, _ = case.broken[way]
    loads = compare.Outcome(None, None, 14, 0.0)
    outcomes = {"ours": None, "theirs": None}
    assert compare.Row(case, **outcomes | {way: compare.Outcome(error=f"Error: {said}")}).passed
    assert not compare.Row(case, **outcomes | {way: compare.Outcome(error="another")}).passed
    assert not compare.Row(case, **outcomes | {way: loads}).passed
