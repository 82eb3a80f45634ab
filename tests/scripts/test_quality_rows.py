"""Rows of the quality table are kept, found and put together again."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from quality_rows import OtherConditionsError, Results, Row, read_rows
from quality_table import table

FIGURES = {"mean_kld": 0.5, "mean_kld_stderr": 0.01, "p999_kld": 5.0, "top1_agreement": 0.7, "perplexity": 25.0}
ROW = Row("4", "rtn", {"seed": 0}, "2 cores", {"torch": "2"}, 4.36, 60.0, 90.0, 512.0, None, {"text": FIGURES})


def test_a_row_that_was_kept_is_found_again(tmp_path: Path) -> None:
    Results(tmp_path).keep(ROW)
    assert Results(tmp_path).find("4", "rtn", {"seed": 0}) == ROW
    assert Results(tmp_path).find("3", "rtn", {"seed": 0}) is None


def test_a_row_of_other_settings_is_not_taken_for_it(tmp_path: Path) -> None:
    Results(tmp_path).keep(ROW)
    with pytest.raises(OtherConditionsError, match="seed"):
        Results(tmp_path).find("4", "rtn", {"seed": 1})


def test_without_a_folder_nothing_is_kept() -> None:
    Results(None).keep(ROW)
    assert Results(None).find("4", "rtn", {"seed": 0}) is None


def test_rows_of_several_folders_make_one_table_by_stored_bits_and_divergence(tmp_path: Path) -> None:
    better = replace(ROW, name="better", machine="a GPU", texts={"text": FIGURES | {"mean_kld": 0.25}})
    Results(tmp_path / "here").keep(ROW)
    Results(tmp_path / "there").keep(better)
    Results(tmp_path / "there").keep(replace(ROW, bits="2", bits_per_weight=2.33))
    lines = list(table(read_rows(tmp_path / "here", tmp_path / "there")))
    titles = [line.split("|")[1].strip() for line in lines[2:7]]
    assert titles == ["**4 to 5 bits**", "`better`", "`rtn`", "**2 to 3 bits**", "`rtn`"]
    assert all(line.count("|") == lines[0].count("|") for line in lines[:7])
    assert "| 0.500 +- 0.010 | 5.00 | 70.0% | 25.0 | 1.0 | 1.5 | 0.5 GiB | 2 |" in lines[4]
    assert lines[-1] == "Machines: 1 a GPU; 2 2 cores."


def test_a_row_is_told_apart_from_others_of_its_name() -> None:
    assert [replace(ROW, bits=bits).title for bits in ("4", "4s", "q4_k_m")] == ["rtn", "rtn symmetric", "rtn q4_k_m"]
