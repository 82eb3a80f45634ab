"""Tuning tables: the measured plan of the nearest size, on this GPU or its like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from aphroquant.kernels.cuda import tuning
from aphroquant.kernels.cuda.device import Gpu
from aphroquant.kernels.cuda.tuning import (
    TABLES,
    Entry,
    Problem,
    load_table,
    nearest,
    plan_dict,
    table_path,
    tuned,
    write_table,
)
from aphroquant.kernels.cuda.variants import ARCHITECTURES

H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Plan:
    stages: int
    persistent: bool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tables of one kernel for one GPU."""
    entries = [
        Entry(Problem("bits=4", n, k, m), plan_dict(Plan(stages, m > 16)), 10.0)
        for stages, (n, k, m) in enumerate([(4096, 4096, 1), (4096, 4096, 16), (28672, 4096, 1), (4096, 14336, 64)])
    ]
    write_table(table_path("decode", H100, tmp_path), H100, "sm_90a", {"torch": "2.11"}, entries)
    load_table.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("size", "stages"),
    [((4096, 4096, 1), 0), ((6144, 4096, 2), 0), ((4096, 4096, 12), 1), ((57344, 8192, 1), 2), ((8192, 28672, 256), 3)],
)
def test_the_nearest_size_decides(folder: Path, size: tuple[int, int, int], stages: int) -> None:
    found = nearest(load_table("decode", H100, "sm_90a", folder), Problem("bits=4", *size))
    assert found is not None
    assert found.plan["stages"] == stages


def test_another_kind_of_weight_has_no_plan(folder: Path) -> None:
    assert nearest(load_table("decode", H100, "sm_90a", folder), Problem("bits=8", 4096, 4096, 1)) is None


def test_a_gpu_of_the_same_architecture_uses_the_table_and_another_does_not(folder: Path) -> None:
    assert len(load_table("decode", "NVIDIA H200", "sm_90a", folder)) == 4
    assert load_table("decode", "NVIDIA A100", "sm_80", folder) == ()
    assert load_table("prefill", H100, "sm_90a", folder) == ()


def test_a_plan_comes_back_as_what_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "gpu", lambda device: Gpu(0, H100, (9, 0), 80 << 30, 132, 50 << 20))
    table = load_table("decode", H100, "sm_90a", folder)
    monkeypatch.setattr(tuning, "load_table", lambda *names: table)
    tuning._tuned.cache_clear()
    assert tuned("decode", Plan, Problem("bits=4", 4096, 14336, 64), 0) == Plan(3, True)
    assert tuned("decode", Plan, Problem("bits=3", 4096, 14336, 64), 0) is None


def test_names_of_gpus_become_names_of_files() -> None:
    assert table_path("decode", H100).name == "decode.nvidia-h100-80gb-hbm3.json"


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.name)
def test_every_table_that_is_checked_in_is_whole(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["architecture"] in ARCHITECTURES
    assert document["conditions"]["torch"]
    assert path == table_path(path.name.partition(".")[0], document["gpu"])
    problems = [(line["kind"], line["n"], line["k"], line["m"]) for line in document["entries"]]
    assert len(set(problems)) == len(problems) > 0
    assert all(line["us"] > 0 and line["plan"] for line in document["entries"])
