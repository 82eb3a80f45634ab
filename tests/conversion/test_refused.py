"""What cannot be converted is refused in a sentence before any work, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import ConversionResult
from aphroquant.errors import InputError, ResourceError, UsageError

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 8, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}


def converted(source: Path, out: Path, **options: Any) -> ConversionResult:
    return aphroquant.convert(source, out=out, **{**QUICK, **options})


def test_a_full_directory_is_refused_before_any_work(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="exists and is not empty"):
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq", dry_run=True)
    converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq", solver="rtn", samples=0, overwrite=True)
    assert open_checkpoint(tmp_path / "out").format_name == "awq"


def test_a_small_disk_is_found_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"the output needs \d+\.\d\d kB, but the disk has 1\.00 kB free"):
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="awq")


def test_a_target_in_capitals_suggests_its_name(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown format 'AWQ'") as raised:
        converted(tiny_checkpoint("llama"), tmp_path / "out", to="AWQ")
    assert raised.value.hint is not None
    assert "Did you mean 'awq'?" in raised.value.hint
    assert "exl3" not in raised.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gguf2"}, "unknown format"),
        ({"to": "exl3"}, "exl3 can be read, but not written"),
        ({"to": "mxfp4"}, "mxfp4 only takes over numbers that the source already has"),
        (
            {"to": "aqlm", "solver": "gptq"},
            "solver gptq makes integer codes and .*FP8, not additive 2x8 g8",
        ),
        ({"to": "awq", "solver": "aqlm"}, "solver aqlm makes sums of codebook vectors"),
        ({"to": "aqlm", "samples": 0}, "solver aqlm needs calibration"),
        ({"to": "aqlm", "scheme": "1x20"}, "at most 16 bits"),
        ({"to": "awq", "group_size": 48}, "must be divisible by group_size = 48"),
        ({"to": "awq", "seq_len": 1000}, "longer than the model's context of 512"),
        ({"to": "awq", "ignore": ["nothing"]}, "--ignore nothing matches no module"),
        ({"to": "awq", "ignore": ["*_proj"]}, "nothing is left to quantize"),
        ({"to": "fp8", "scheme": "fp8-static", "samples": 0}, "need calibration, but samples = 0"),
    ],
)
def test_mistakes_are_found_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message.replace("*_", r"\*_")):
        converted(tiny_checkpoint("llama"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("samples", [0, 8])
def test_a_damaged_weight_is_named_and_no_output_is_left(tiny_checkpoint: Tiny, tmp_path: Path, samples: int) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint("llama"), damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        converted(damaged, tmp_path / "out", to="awq", solver="rtn", samples=samples)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"damaged", ".out.job"} if samples else {"damaged"})
