"""--json: where it may go, and what is told when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aphroquant.cli.json_report import check_json_target, write_json
from aphroquant.errors import UsageError


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    check_json_target("-")
    write_json("-", {"name": "\u00fc"})
    assert json.loads(capsys.readouterr().out) == {"name": "\u00fc"}


def test_a_name_without_a_folder_is_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_json_target("report.json")
    write_json("report.json", {"a": 1})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}


def test_places_that_cannot_be_written_are_usage_errors(tmp_path: Path) -> None:
    for target, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "report.json", "there is no directory")):
        with pytest.raises(UsageError, match=message):
            check_json_target(str(target))
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        write_json(str(tmp_path), {})
