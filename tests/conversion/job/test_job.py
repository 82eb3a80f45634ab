"""A conversion that ended early goes on from its job, and ends in the bytes of one that did not."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.conversion import Progress, together, walk
from aphroquant.conversion.blocks import CalibratedSolver, SolvedBlock
from aphroquant.conversion.calibration_block import CalibrationBlock
from aphroquant.conversion.distillation import Distiller
from aphroquant.conversion.job.record import RecordFile, find_records
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.run import convert_all
from aphroquant.errors import InputError, ResourceError, UsageError

Tiny = Callable[..., Path]
LAYERS = 4
RECORDS = ("aphroquant.json", "SHA256SUMS")  # which tell times, and the sums of files that do
QUICK: dict[str, Any] = {
    "to": "gptq",
    "bits": 3,
    "group_size": 32,
    "samples": 16,
    "seq_len": 32,
    "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl",
}


class Stopped(Exception):  # noqa: N818 (it is no error)
    """What ends a conversion in these tests."""


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(autouse=True)
def _at_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: tiny blocks are solved faster than a record is written."""
    monkeypatch.setattr("aphroquant.conversion.job.pace.SHARE", 1e9)


@pytest.fixture
def source(tiny_checkpoint: Tiny) -> Path:
    return tiny_checkpoint("llama", num_hidden_layers=LAYERS)


def converted(source: Path, out: Path, **options: Any) -> Notes:
    notes = Notes()
    aphroquant.convert(source, out=out, progress=notes, **{**QUICK, **options})
    return notes


def stopped(source: Path, out: Path, block: int, **options: Any) -> None:
    """A conversion that ends before it has solved this block, the first being 1."""
    original = walk.load_calibration_block

    def load(checkpoint: Any, layer: int, *rest: Any) -> CalibrationBlock:
        if layer + 1 == block:
            raise Stopped
        return original(checkpoint, layer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "load_calibration_block", load)
        with pytest.raises(Stopped):
            converted(source, out, **options)


def content(out: Path) -> dict[str, Any]:
    """What repeats exactly of a checkpoint."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir() if path.name not in RECORDS}
    told = json.loads((out / "aphroquant.json").read_text())
    return found | {"told": {key: value for key, value in told.items() if key not in ("timings", "environment")}}


Undisturbed = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """`undisturbed(**options)`: the content of a conversion of `source` in one go, made once."""
    made: dict[str, dict[str, Any]] = {}

    def make(**options: Any) -> dict[str, Any]:
        key = repr(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            converted(tiny_checkpoint("llama", num_hidden_layers=LAYERS), out, **options)
            made[key] = content(out)
        return made[key]

    return make


def records(out: Path, kind: str) -> list[RecordFile]:
    return [record for record in find_records(out.parent / f".{out.name}.job") if record.kind == kind]


def damage(record: RecordFile) -> None:
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "awq-gptaq"},
        {"solver": "awq-yaqa"},
        {"solver": "rtn", "refine_steps": 4, "distill_steps": 2},
        {"to": "aqlm", "scheme": "1x2", "bits": None, "group_size": None},
        {"to": "compressed-tensors", "scheme": "fp8-static", "bits": None, "group_size": None},
    ],
    ids=["gptq", "following", "two-sided", "trained", "aqlm", "fp8"],
)
def test_a_conversion_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, undisturbed: Undisturbed, options: dict[str, Any]
) -> None:
    stopped(source, tmp_path / "out", 3, **options)
    assert "going on from block 3 of 4" in converted(source, tmp_path / "out", **options).text
    assert content(tmp_path / "out") == undisturbed(**options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_experts_go_on_to_the_same_bytes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    options = {"samples": 64, "solver": "gptq"}
    stopped(source, tmp_path / "out", 2, **options)
    assert "going on from block 2 of 2" in converted(source, tmp_path / "out", **options).text
    converted(source, tmp_path / "other" / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "other" / "out")


def test_several_outputs_go_on_together(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    wide = tiny_checkpoint("llama", hidden_size=256, intermediate_size=512)
    shared = {name: QUICK[name] for name in ("samples", "seq_len")} | {"calibration": (QUICK["calibration"],)}
    wanted: dict[str, dict[str, Any]] = {
        "awq": {"to": "awq", "group_size": 32},
        "three": {"to": "gptq", "bits": 3, "group_size": 32},
        "static": {"to": "fp8", "scheme": "fp8-static"},
        "model.gguf": {"to": "gguf", "scheme": "q4_k_m"},
    }

    def convert(folder: Path, notes: Notes) -> None:
        requests = [ConversionRequest(str(wide), out=folder / name, **shared, **own) for name, own in wanted.items()]
        convert_all(requests, progress=notes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibratedSolver, "solve", stopping_at(CalibratedSolver.solve, 3))
        with pytest.raises(Stopped):
            convert(tmp_path / "a", Notes())
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".awq.job"]
    notes = Notes()
    convert(tmp_path / "a", notes)
    assert "going on from block 2 of 2" in notes.text
    convert(tmp_path / "b", Notes())
    for name in ("awq", "three", "static"):
        assert content(tmp_path / "a" / name) == content(tmp_path / "b" / name)
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()


def stopping_at(original: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`original`, whose so many-th call ends the conversion instead."""
    calls = 0

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return original(*args)

    return stopping


def test_solved_blocks_are_not_solved_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(source, tmp_path / "out", 4)
    solved: list[int] = []
    original = CalibratedSolver.solve

    def watched(self: CalibratedSolver, block: CalibrationBlock) -> SolvedBlock:
        solved.append(block.block.layer)
        return original(self, block)

    monkeypatch.setattr(CalibratedSolver, "solve", watched)
    converted(source, tmp_path / "out")
    assert solved == [3]


@pytest.mark.parametrize("step", [1, 5, 8])
def test_distillation_goes_on_after_its_last_step(
    source: Path, tmp_path: Path, undisturbed: Undisturbed, step: int
) -> None:
    options = {"solver": "rtn", "distill_steps": 8, "bits": 2}
    name = "_better" if step == 8 else "_step"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distiller, name, stopping_at(getattr(Distiller, name), step + (step < 8)))
        with pytest.raises(Stopped):
            converted(source, tmp_path / "out", **options)
    assert [record.number for record in records(tmp_path / "out", "steps0")][-1] == step - (step == 8)
    words = converted(source, tmp_path / "out", **options).text
    assert "all 4 blocks are solved already" in words
    assert f"going on after step {step - (step == 8)}" in words
    assert content(tmp_path / "out") == undisturbed(**options)


def test_two_states_are_kept_and_a_damaged_one_is_not_used(
    source: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    out = tmp_path / "out"
    stopped(source, out, 4)
    assert [record.number for record in records(out, "states")] == [1, 2]
    damage(records(out, "states")[-1])
    words = converted(source, out).text
    assert "the states behind block 3 are damaged and are not used" in words
    assert "going on from block 3 of 4" in words
    assert content(out) == undisturbed()


def test_with_all_states_damaged_it_begins_at_the_first_block(
    source: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    out = tmp_path / "out"
    stopped(source, out, 4)
    for record in records(out, "states"):
        damage(record)
    assert "going on from" not in converted(source, out).text
    assert content(out) == undisturbed()


def test_a_damaged_block_and_those_behind_it_are_solved_again(
    source: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    out = tmp_path / "out"
    stopped(source, out, 4)
    damage(records(out, "block")[2])
    words = converted(source, out).text
    assert "the record of block 3 is damaged and is not used" in words
    assert "going on from block 3 of 4" in words
    assert content(out) == undisturbed()


def test_states_are_kept_more_rarely_where_that_is_slow(
    source: Path, tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aphroquant.conversion.job.pace.SHARE", 1e-9)
    stopped(source, tmp_path / "out", 4)
    assert [record.number for record in records(tmp_path / "out", "states")] == [0]
    assert "going on from block 2 of 4" in converted(source, tmp_path / "out").text
    assert content(tmp_path / "out") == undisturbed()


def test_another_request_begins_anew_and_says_what_differs(
    source: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    stopped(source, tmp_path / "out", 3)
    words = converted(source, tmp_path / "out", seed=5).text
    assert "of another conversion: seed was 0, and is 5 now" in words
    assert "going on" not in words
    assert content(tmp_path / "out") == undisturbed(seed=5)


@pytest.mark.parametrize("change", ["source", "text", "threads"])
def test_what_else_decides_the_bytes_is_compared(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "source"
    os.system(f"cp -r {tiny_checkpoint('llama')} {source}")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    stopped(source, tmp_path / "out", 2, calibration=text)
    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    elif change == "text":
        text.write_text(text.read_text().replace("fox", "cat"))
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    reason = {"source": "file model.safetensors is another", "text": "calibration windows is another", "threads": "64"}
    assert reason[change] in converted(source, tmp_path / "out", calibration=text).text


def test_a_named_job_of_another_conversion_is_refused(source: Path, tmp_path: Path) -> None:
    job = tmp_path / "job"
    stopped(source, tmp_path / "out", 2, job=job)
    with pytest.raises(UsageError, match=r"is of another conversion: bits was 3, and is 4 now"):
        converted(source, tmp_path / "out", bits=4, job=job)
    assert "going on from block 2 of 4" in converted(source, tmp_path / "out", job=job).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_named_directory_with_something_else_in_it_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear")
    with pytest.raises(UsageError, match="letters holds something else than a job"):
        converted(source, tmp_path / "out", job=tmp_path / "letters")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is not a directory"):
        converted(source, tmp_path / "out", job=tmp_path / "file")
    assert (tmp_path / "letters" / "to_mother.txt").exists()


def test_two_processes_do_not_work_on_one_job(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 2)
    other = os.open(tmp_path / ".out.job", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="another process is at work on this conversion"):
        converted(source, tmp_path / "out")
    os.close(other)
    assert "going on from block 2" in converted(source, tmp_path / "out").text


def test_without_a_job_nothing_is_kept(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 3, job=False)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_solved_no_block_leaves_no_job(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 1)
    assert not list(tmp_path.iterdir())


def test_the_job_of_an_output_made_in_another_way_is_removed(source: Path, tmp_path: Path) -> None:
    stopped(source, tmp_path / "out", 2)
    converted(source, tmp_path / "out", samples=0, solver="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("settings", ["", "[]", "{}", '{"fingerprint": 3}'])
def test_a_damaged_description_begins_anew(source: Path, tmp_path: Path, settings: str) -> None:
    stopped(source, tmp_path / "out", 3)
    (tmp_path / ".out.job" / "job.json").write_text(settings)
    assert "job.json is damaged" in converted(source, tmp_path / "out").text


def test_without_room_for_a_job_the_conversion_goes_on_and_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "kept_bytes", lambda *args, observes: 10**18)
    assert "no job is kept, so that a killed conversion begins anew" in converted(source, tmp_path / "out").text
    with pytest.raises(ResourceError, match=r"the output need 1000000000\.\d+ GB, but the disk has"):
        converted(source, tmp_path / "other", job=tmp_path / "job")


@pytest.mark.parametrize("kind", ["block", "states"])
def test_a_disk_that_becomes_full_ends_the_conversion_with_the_work_kept(
    source: Path, tmp_path: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from aphroquant.conversion.job import directory

    def full(folder: Path, name: str, number: int, *args: Any) -> RecordFile:
        if (name, number) == (kind, 2):
            raise OSError(28, "No space left on device")
        return original(folder, name, number, *args)

    original = directory.write_record
    monkeypatch.setattr(directory, "write_record", full)
    with pytest.raises(ResourceError, match="the disk is full, and the last of the work cannot be kept"):
        converted(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.job"]
    monkeypatch.setattr(directory, "write_record", original)
    assert "going on from block 3 of 4" in converted(source, tmp_path / "out").text
    assert content(tmp_path / "out") == undisturbed()


def test_activations_that_are_no_numbers_end_it_with_the_work_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = walk.load_calibration_block

    def exploding(checkpoint: Any, layer: int, *rest: Any) -> CalibrationBlock:
        block = original(checkpoint, layer, *rest)
        if layer == 2:
            block.norms["input_layernorm"] = block.norms["input_layernorm"] * float("inf")
        return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "load_calibration_block", exploding)
        with pytest.raises(InputError, match=r"layers\.2.*its input is not finite in calibration sample 0"):
            converted(source, tmp_path / "out", solver="gptq")
    assert "going on from block 3 of 4" in converted(source, tmp_path / "out", solver="gptq").text


def test_a_lack_of_memory_ends_it_with_the_work_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CalibratedSolver.solve

    def solve(self: CalibratedSolver, block: CalibrationBlock) -> SolvedBlock:
        if block.block.layer == 1:
            raise MemoryError
        return original(self, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibratedSolver, "solve", solve)
        with pytest.raises(MemoryError):
            converted(source, tmp_path / "out")
    assert "going on from block 2 of 4" in converted(source, tmp_path / "out").text


def test_a_decision_by_free_memory_stays_what_it_was(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aphroquant.conversion.training_memory.free_memory", lambda device: 10**6)
        stopped(source, tmp_path / "out", 3, solver="rtn", distill_steps=2)
    assert "going on from block 3" in converted(source, tmp_path / "out", solver="rtn", distill_steps=2).text
    told = json.loads((tmp_path / "out" / "aphroquant.json").read_text())["result"]
    assert told["distillation"] == {}
    assert told["warnings"][0].startswith("distillation is left out")
