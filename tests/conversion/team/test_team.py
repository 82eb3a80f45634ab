"""Several processes make what one makes, and what ends one of them ends all, with its reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant.conversion import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.run import convert_all
from aphroquant.conversion.team import hiring
from aphroquant.conversion.team.team import MAX_WORKERS, chunks_of, groups
from aphroquant.conversion.walk import Walk
from aphroquant.errors import InputError, ResourceError, UsageError

Tiny = Callable[..., Path]
RECORDS = ("aphroquant.json", "SHA256SUMS")  # which tell times, and the sums of files that do
INTEGERS = {"to": "gptq", "bits": 3, "group_size": 32}
WANTED: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "plain": INTEGERS,
        "trained": {**INTEGERS, "bits": 2, "solver": "rtn", "refine_steps": 4, "distill_steps": 2},
        "following": {**INTEGERS, "solver": "awq-gptaq"},
        "two sides": {**INTEGERS, "solver": "awq-yaqa"},
        "static": {"to": "fp8", "scheme": "fp8-static", "kv_scales": True},
        "floats": {"to": "compressed-tensors", "scheme": "nvfp4", "solver": "gptq", "kv_scales": True},
        "model.gguf": {"to": "gguf", "scheme": "q4_0"},
    },
    "qwen3_moe": {
        "experts": {**INTEGERS, "to": "compressed-tensors", "bits": 4, "solver": "gptq"},
        "static": {"to": "compressed-tensors", "scheme": "fp8-static"},
    },
}
MORE = {"qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}}


class Notes(Progress):
    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        self.text += f"{text}\n"


@pytest.fixture(autouse=True)
def _one_thread_each() -> Any:
    """As each of several workers has on a small machine: sums may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} times the quick brown fox jumps over the lazy dog. " for number in range(200)))
    return path


def requests(source: Path, folder: Path, text: Path, wanted: dict[str, dict[str, Any]]) -> list[ConversionRequest]:
    shared = {"calibration": (text,), "samples": 19, "seq_len": 32, "device": "cpu"}
    return [ConversionRequest(str(source), out=folder / name, **{**shared, **own}) for name, own in wanted.items()]


def content(out: Path) -> dict[str, bytes]:
    paths = [out] if out.is_file() else [path for path in out.iterdir() if path.name not in RECORDS]
    return {path.name: path.read_bytes() for path in paths}


@pytest.mark.parametrize("family", list(WANTED))
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tiny_checkpoint: Tiny, tmp_path: Path, text: Path, family: str
) -> None:
    source, wanted = tiny_checkpoint(family, **MORE.get(family, {})), WANTED[family]
    for workers in (1, 2):
        convert_all(requests(source, tmp_path / str(workers), text, wanted), workers=workers)
    for name in wanted:
        assert content(tmp_path / "1" / name) == content(tmp_path / "2" / name), name


def test_an_error_of_another_worker_is_told(
    tiny_checkpoint: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = hiring._started
    monkeypatch.setattr(
        hiring, "_started", lambda orders: start(replace(orders, windows=torch.full_like(orders.windows, 999)))
    )
    with pytest.raises(InputError, match=r"tiny-llama.*: the tokenizer gives token id 999, but the model's vocabulary"):
        convert_all(requests(tiny_checkpoint("llama"), tmp_path / "a", text, {"out": INTEGERS}), workers=2)
    assert not list((tmp_path / "a").iterdir())


def test_a_killed_worker_ends_the_conversion_which_goes_on_with_any_number_of_them(
    tiny_checkpoint: Tiny, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, started = tiny_checkpoint("llama"), []
    start, passed = hiring._started, Walk._passed
    monkeypatch.setattr("aphroquant.conversion.job.pace.SHARE", 1e9)
    with monkeypatch.context() as patch:

        def watched(orders: Any) -> Any:
            started.append(start(orders))
            return started[-1]

        def killing(self: Walk, block: Any) -> Any:
            if block.block.layer == 1:
                started[0].kill()
            return passed(self, block)

        patch.setattr(hiring, "_started", watched)
        patch.setattr(Walk, "_passed", killing)
        with pytest.raises(ResourceError, match="worker 2 of 2 was killed by signal 9"):
            convert_all(requests(source, tmp_path / "a", text, {"out": INTEGERS}), workers=2)
    notes = Notes()
    convert_all(requests(source, tmp_path / "a", text, {"out": INTEGERS}), progress=notes)
    assert "going on from block 2 of 2" in notes.text
    convert_all(requests(source, tmp_path / "b", text, {"out": INTEGERS}))
    assert content(tmp_path / "a" / "out") == content(tmp_path / "b" / "out")


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ("many", "--workers many must be a number, auto, ray, ray:N"),
        (0, f"--workers 0 must be between 1 and {MAX_WORKERS}"),
        (-1, "must be between 1"),
        (5, "--workers 5 are more than the 4 windows of calibration text"),
    ],
)
def test_more_workers_than_there_is_work_for_are_refused(workers: str | int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hiring.num_workers(workers, torch.device("cpu"), 4)


@pytest.mark.parametrize("workers", [0, MAX_WORKERS + 1, "ray:none", "ray"])
def test_workers_that_cannot_be_are_refused_before_the_text_is_read(
    tiny_checkpoint: Tiny, tmp_path: Path, workers: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    asked = requests(tiny_checkpoint("llama"), tmp_path, tmp_path / "none.txt", {"out": INTEGERS})
    with pytest.raises(UsageError, match=f"--workers {workers}"):
        convert_all(asked, workers=workers)


def test_auto_is_one_worker_on_a_cpu() -> None:
    assert hiring.num_workers("auto", torch.device("cpu"), 4) == 1


@pytest.mark.parametrize("num_windows", [1, 2, 7, 8, 9, 128])
def test_groups_are_whole_windows_and_all_of_them(num_windows: int) -> None:
    found = groups(num_windows * 6, 6)
    assert len(found) == min(num_windows, MAX_WORKERS)
    assert [row for group in found for row in range(group.start, group.stop)] == list(range(num_windows * 6))
    assert all(group.start % 6 == 0 and group.stop > group.start for group in found)
    parts = [part for group in found for part in chunks_of(group, 6)]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_windows * 6))
