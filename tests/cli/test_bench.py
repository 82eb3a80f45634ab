"""aphroquant bench kernels: a table, one JSON line at the end, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aphroquant.cli import run
from aphroquant.kernels.benchmark import cpu_run
from aphroquant.kernels.benchmark.measure import Ceilings
from aphroquant.kernels.cpu import library
from aphroquant.kernels.cuda import device


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round, two copies, and no measuring of the machine."""
    if reason := library.obstacle():
        pytest.skip(reason)
    monkeypatch.setattr(cpu_run, "_SECONDS", 0.0)
    monkeypatch.setattr(cpu_run, "last_level_cache", lambda: 1000)
    monkeypatch.setattr(cpu_run, "cpu_ceilings", lambda: Ceilings(1e10, {"float32": 1e11}))


def test_the_table_ends_with_sums_and_a_line_of_json(
    quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "bench.json"
    arguments = ["--backend", "cpu", "--shapes", "smollm2-135m", "--m", "1,4", "--scheme", "w4g32"]
    assert run(["bench", "kernels", *arguments, "--json", str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads(target.read_text())
    assert len(report["rows"]) == 4 * 2 * 2
    assert {row["shapes"] for row in report["rows"]} == {"smollm2-135m"}
    assert all(row["error"] < 0.02 and row["us"] > 0 for row in report["rows"])
    assert report["scheme"] == "w4g32"
    assert sum(line.startswith("all") for line in lines) == 4


def test_one_layer_has_no_sum(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "kernels", "--backend", "cpu", "--shapes", "64x128", "--m", "1"]) == 0
    assert "\nall" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "int4"], "scheme 'int4' must be wBITS"),
        (["--shapes", "gpt-5"], "shapes 'gpt-5' must be one of"),
        (["--m", "1,x"], "--m 1,x must be whole numbers"),
        (["--m", "0"], "--m 0 must be between 1 and"),
        (["--peers", "."], "--peers is for a GPU"),
        (["--json", "/"], "--json / is a directory"),
    ],
)
def test_what_cannot_be_run_is_refused_first(
    quick: None, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["bench", "kernels", "--backend", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, "obstacle", lambda: "there is no GPU")
    assert run(["bench", "kernels", "--backend", "cuda"]) == 2
    assert "CUDA kernels cannot run: there is no GPU" in capsys.readouterr().err


def test_bench_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    assert "kernels" in capsys.readouterr().out
    assert run(["bench", "kernel"]) == 2
