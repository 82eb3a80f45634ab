"""Tuning: the fastest plan that computes the right numbers, in a table that is read back."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.kernels.cuda.device import Gpu
from aphroquant.kernels.cuda.tuning import Entry, Problem, Tunable, load_table, plan_dict, table_path, write_table

SCRIPT = Path(__file__).parents[2] / "scripts" / "tune_kernels.py"
GPU = Gpu(0, "Test GPU", (9, 0), 1 << 30, 132, 1 << 20)
PROBLEMS = [Problem("bits=4", 64, 64, tokens) for tokens in (1, 16)]


@dataclass(frozen=True)
class Plan:
    """`microseconds` is what it takes, `offset` how wrong it is; without shared memory it cannot be launched."""

    microseconds: float
    offset: float = 0.0
    fits: bool = True


def _prepare(problem: Problem, plan: Plan, copies: int) -> Sequence[Callable[[], Tensor]]:
    if not plan.fits:
        raise RuntimeError("too much shared memory\nand a second line")

    def run(taken: float) -> Tensor:
        return torch.arange(8.0) + plan.offset

    return [partial(run, plan.microseconds)] * copies


def _time(calls: Sequence[Any], replays: int) -> float:
    microseconds: float = calls[0].args[0]
    return microseconds


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("tune_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tune_kernels", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "time_rotated", _time)
    monkeypatch.setattr(module, "num_copies", lambda num_bytes: 2)
    monkeypatch.setattr(module, "compile_kernel", lambda name, macros, architecture: None)
    monkeypatch.setattr(module, "architecture", lambda: "sm_90a")
    monkeypatch.setattr(module, "require", lambda: None)
    monkeypatch.setattr(module, "gpu", lambda device: GPU)
    monkeypatch.setattr(module, "read_bandwidth", lambda: 3e12)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield module


def _tunable(*plans: Plan) -> Tunable:
    return Tunable(
        name="decode",
        plan=Plan,
        problems=lambda: PROBLEMS,
        candidates=lambda problem: plans,
        prepare=_prepare,
        weight_bytes=lambda problem: 1,
        sources=lambda problem, plan: [("decode.cu", {"TOKENS": problem.tokens})],
    )


def test_the_fastest_plan_that_agrees_with_the_others_is_chosen(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [Plan(3.0), Plan(2.0), Plan(1.0, offset=5.0), Plan(0.5, fits=False), Plan(4.0)]
    best = script.fastest(_tunable(*plans), PROBLEMS[0], plans)
    assert best == Entry(PROBLEMS[0], {"microseconds": 2.0, "offset": 0.0, "fits": True}, 2.0)
    said = capsys.readouterr().out
    assert "WRONG, differs by" in said
    assert "too much shared memory" in said
    assert "second line" not in said


def test_nothing_is_chosen_where_nothing_runs(script: ModuleType) -> None:
    assert script.fastest(_tunable(), PROBLEMS[0], [Plan(1.0, fits=False)]) is None
    assert script.fastest(_tunable(), PROBLEMS[0], []) is None


def test_the_table_is_written_and_read_back(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "all_tunables", lambda: [_tunable(Plan(3.0), Plan(2.0))])
    monkeypatch.setattr(sys, "argv", ["tune_kernels", "--tables", str(tmp_path)])
    load_table.cache_clear()
    assert script.main() == 0
    load_table.cache_clear()
    table = load_table("decode", GPU.name, GPU.architecture, tmp_path)
    assert [(entry.problem, entry.plan["microseconds"]) for entry in table] == [(p, 2.0) for p in PROBLEMS]


def test_the_plan_of_an_older_table_is_tried_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels", "--tables", str(tmp_path)])
    for plans in ([Plan(2.0)], [Plan(3.0)]):
        monkeypatch.setattr(script, "all_tunables", lambda plans=plans: [_tunable(*plans)])
        load_table.cache_clear()
        assert script.main() == 0
    load_table.cache_clear()
    table = load_table("decode", GPU.name, GPU.architecture, tmp_path)
    assert {entry.plan["microseconds"] for entry in table} == {2.0}


def test_without_time_left_older_entries_stay(script: ModuleType, tmp_path: Path) -> None:
    load_table.cache_clear()
    saved: list[list[Entry]] = []
    assert script.tune(_tunable(Plan(1.0)), PROBLEMS, GPU, float("-inf"), tmp_path, saved.append) == []
    assert saved == []


def test_only_what_is_asked_for_is_measured(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "all_tunables", lambda: [_tunable(Plan(3.0))])
    monkeypatch.setattr(sys, "argv", ["tune_kernels", "--tables", str(tmp_path), "--tokens", "16", "--kind", "bits=4"])
    load_table.cache_clear()
    assert script.main() == 0
    load_table.cache_clear()
    assert [entry.problem.tokens for entry in load_table("decode", GPU.name, GPU.architecture, tmp_path)] == [16]


def test_a_gpu_without_a_table_begins_with_that_of_a_similar_one(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked_in = tmp_path / "checked-in"
    entries = [Entry(problem, plan_dict(Plan(1.0)), 1.0) for problem in PROBLEMS]
    write_table(table_path("decode", "Another GPU", checked_in), "Another GPU", GPU.architecture, {}, entries)
    monkeypatch.setattr(script, "TABLES", checked_in)
    monkeypatch.setattr(script, "all_tunables", lambda: [_tunable(Plan(3.0))])
    arguments = ["tune_kernels", "--tables", str(tmp_path / "own"), "--tokens", "16"]
    monkeypatch.setattr(sys, "argv", arguments)
    load_table.cache_clear()
    assert script.main() == 0
    load_table.cache_clear()
    table = load_table("decode", GPU.name, GPU.architecture, tmp_path / "own")
    assert [entry.problem.tokens for entry in table] == [1, 16]  # the first was not asked for, and is kept
    assert table[1].plan["microseconds"] == 1.0  # the other GPU's plan was tried, too
