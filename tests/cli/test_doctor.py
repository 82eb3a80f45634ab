"""aphroquant doctor: what it finds, what it tests, and how it ends."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aphroquant import diagnosis
from aphroquant.cli import run
from aphroquant.kernels import self_test
from aphroquant.kernels.cpu import library
from aphroquant.kernels.cuda import device
from aphroquant.kernels.cuda.device import Gpu
from aphroquant.kernels.self_test import Outcome, SelfTest, run_one, run_self_tests

OLD_GPU = Gpu(0, "NVIDIA T4", (7, 5), 16 << 30, 40, 4 << 20)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APHROQUANT_CACHE", str(tmp_path))
    return tmp_path


def _outcomes(*problems: str | None) -> list[Outcome]:
    return [Outcome(f"test {i}", 1e-7, 2e-6, 0.01, problem) for i, problem in enumerate(problems)]


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What the self-tests of the CPU are going to give."""
    outcomes: list[Outcome] = _outcomes(None, None)
    monkeypatch.setattr(library, "obstacle", lambda: None)
    monkeypatch.setattr(device, "obstacle", lambda: "no GPU here")
    monkeypatch.setattr(self_test, "run_self_tests", lambda device: iter(outcomes))
    return outcomes


def test_a_machine_without_a_gpu_is_no_failure(tests: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "2 of 2 passed" in text
    assert "cuda compiler" in text


def test_a_failed_self_test_ends_with_1_and_is_shown(tests: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    tests[1:] = _outcomes("relative error 3.0e-01 exceeds 2e-06")
    assert run(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "test 0: relative error 3.0e-01 exceeds 2e-06" in text
    assert "1 of 2 passed" in text


def test_the_report_is_json(tests: list[Outcome], capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    tests[:] = _outcomes(None, "wrong")
    assert run(["doctor", "--json", "-"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["failures"] == 1
    assert [test["problem"] for test in report["self_tests"]] == [None, "wrong"]
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["kernel cache"]["folder"] == str(cache / "kernels")
    assert found["versions"]["versions"]["torch"] == torch.__version__


def test_without_tests_only_the_machine_is_looked_at(tests: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--no-tests"]) == 0
    assert "passed" not in capsys.readouterr().out


def test_build_needs_a_gpu(tests: list[Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--build"]) == 2
    assert "--build has no GPU to compile for: no GPU here" in capsys.readouterr().err


def test_a_gpu_that_is_too_old_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "no_gpu", lambda: None)
    monkeypatch.setattr(device, "gpu", lambda index: OLD_GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (found,) = diagnosis.gpus()
    assert found.usable is False
    assert "NVIDIA T4 has compute capability 7.5; the CUDA kernels need 8.0 (Ampere) or newer" in found.text
    assert found.hint == "run on the CPU with --backend cpu"


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "hint"),
    [
        (None, None, None),
        (None, (13, 0), "install torch with CUDA"),
        ("13.0", None, "install the NVIDIA driver"),
        ("13.0", (12, 8), "the driver runs CUDA 12.8, torch was built for 13.0: update the driver"),
    ],
)
def test_what_is_missing_for_a_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch, torch_cuda: str | None, driver: tuple[int, int] | None, hint: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    found = diagnosis._gpu_hint(driver)
    assert found is None if hint is None else hint in str(found)


def test_a_missing_library_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "obstacle", lambda: "there is no library")
    found = diagnosis.cpu()
    assert found.usable is False
    assert "the slow reference kernels run: there is no library" in found.text
    assert "C++ compiler" in str(found.hint)


@pytest.mark.parametrize(
    ("error", "problem"),
    [(1e-7, None), (1e-3, "relative error 1.00e-03 exceeds 1e-06"), (float("nan"), "relative error nan exceeds 1e-06")],
)
def test_a_self_test_passes_within_its_tolerance(error: float, problem: str | None) -> None:
    assert run_one(SelfTest("name", lambda: error, 1e-6)).problem == problem


def test_a_self_test_that_raises_is_a_finding() -> None:
    def fail() -> float:
        raise RuntimeError("out of memory")

    assert run_one(SelfTest("name", fail, 1e-6)).problem == "RuntimeError: out of memory"


@pytest.fixture
def crashing_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Test processes: the first dies in its second test, the next one ends well."""
    outputs = [
        '{"starts": "a"}\n{"name": "a", "error": 0.0, "tolerance": 1.0, "seconds": 0.0, "problem": null}\n'
        '{"starts": "b"}\n',
        '{"starts": "c"}\n{"name": "c", "error": 0.0, "tolerance": 1.0, "seconds": 0.0, "problem": null}\n',
    ]
    asked: list[str] = []

    def process(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        index = len(asked) - 1
        return subprocess.CompletedProcess(command, -11 if index == 0 else 0, outputs[index], "Illegal instruction\n")

    monkeypatch.setattr(subprocess, "run", process)
    yield asked


def test_a_kernel_that_crashes_is_named_and_the_others_still_run(crashing_process: list[str]) -> None:
    outcomes = list(run_self_tests("cpu"))
    assert [outcome.name for outcome in outcomes] == ["a", "b", "c"]
    assert [outcome.problem for outcome in outcomes] == [
        None,
        "the process ended with code -11: Illegal instruction",
        None,
    ]
    assert crashing_process == ["0", "2"]


def test_the_cpu_kernels_of_this_machine_pass() -> None:
    if reason := library.obstacle():
        pytest.skip(reason)
    outcomes = list(run_self_tests("cpu"))
    assert len(outcomes) >= 12 * len(library.instruction_sets())
    assert [outcome for outcome in outcomes if outcome.problem] == []
    assert all(outcome.name.startswith("cpu ") for outcome in outcomes)
