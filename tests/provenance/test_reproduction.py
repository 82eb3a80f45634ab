"""`aphroquant reproduce` makes the same bytes again, or says in one sentence why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aphroquant
from aphroquant.cli import run
from aphroquant.errors import GateError, InputError
from aphroquant.provenance.metrics import record_evaluation
from aphroquant.provenance.records import OutputRecord
from aphroquant.provenance.reproduction import reproduce


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of an output."""
    file = OutputRecord(path).manifest_path
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_calibrated_conversion_with_rules_is_made_again_byte_for_byte(source: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("Words and more words, one after the other. " * 200)
    options: dict[str, Any] = {"solver": "gptq", "samples": 4, "seq_len": 32, "seed": 3, "calibration": text}
    aphroquant.convert(source, to="compressed-tensors", rules=["down_proj: bits=8"], out=out, **options)
    found = reproduce(out, work=tmp_path)
    assert found.is_same
    assert found.changes == ()
    assert not list(tmp_path.glob("aphroquant-reproduce-*"))
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(InputError, match=r"calibration text .*text\.txt: cannot be read"):
        reproduce(out)
    assert reproduce(out, calibration=[moved]).is_same
    moved.write_text("others")
    with pytest.raises(InputError, match=r"calibration text .*moved\.txt is not what it was"):
        reproduce(out, calibration=[moved])


def test_bundled_texts_are_found_again(source: Path, tmp_path: Path) -> None:
    aphroquant.convert(source, to="gptq", solver="gptq", samples=2, seq_len=32, out=tmp_path / "out")
    assert reproduce(tmp_path / "out").is_same


def test_a_repacked_checkpoint_and_a_gguf_file_are_made_again(
    made: Path, gguf: Path, source: Path, tmp_path: Path
) -> None:
    aphroquant.convert(made, to="awq", out=tmp_path / "awq", requantize=True, solver="rtn", samples=0)
    aphroquant.convert(made, to="compressed-tensors", out=tmp_path / "ct")
    for path in (tmp_path / "awq", tmp_path / "ct"):
        assert reproduce(path).is_same, path
    moved = Path(shutil.copytree(source, tmp_path / "another-name"))
    assert reproduce(gguf, source=moved).is_same  # which holds the source's name


def test_an_evaluation_recorded_meanwhile_changes_nothing(output: Path, source: Path) -> None:
    record_evaluation(output, aphroquant.evaluate(output, against=source, windows=1, window_len=32).to_dict())
    assert reproduce(output).is_same


def test_a_source_that_is_gone_or_another_one_is_named(output: Path, source: Path, tmp_path: Path) -> None:
    edit(output, lambda content: content["request"].update(source=str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"the source cannot be read: .*gone: no such file"):
        reproduce(output)
    assert reproduce(output, source=source).is_same
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not what it was: the SHA-256 of generation_config\.json is not the"):
        reproduce(output, source=other)
    (other / "generation_config.json").unlink()
    with pytest.raises(InputError, match=r"is not what it was: generation_config\.json is not there"):
        reproduce(output, source=other)


def test_other_versions_are_told_and_may_be_tried(output: Path) -> None:
    edit(output, lambda content: content["environment"].update(torch="1.0", python="2.7"))
    with pytest.raises(InputError, match=r"reproduced here: python is .* here and was 2\.7; torch is .* 1\.0"):
        reproduce(output)
    found = reproduce(output, any_versions=True)
    assert found.is_same
    assert len(found.changes) == 2


def test_other_settings_give_differences_by_tensor(output: Path) -> None:
    edit(output, lambda content: content["request"].update(group_size=32))
    found = reproduce(output)
    weights = next(difference for difference in found.differences if difference.file == "model.safetensors")
    assert "model.layers.0.mlp.up_proj.scales" in weights.tensors
    assert "model.norm.weight" not in weights.tensors
    assert any(difference.file == "aphroquant.json: result" for difference in found.differences)


def test_files_that_are_others_by_now_prove_nothing(output: Path) -> None:
    (output / "config.json").write_text("{}")
    with pytest.raises(GateError, match=r"config\.json is not as it was recorded"):
        reproduce(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "request: surprise is no setting that this release knows"),
        ({"samples": "many"}, r"request\.samples: Input should be a valid integer"),
        ({"rules": [{"match": 5}]}, r"request\.rules\.0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change: dict[str, Any], message: str, output: Path) -> None:
    edit(output, lambda content: content["request"].update(change))
    with pytest.raises(InputError, match=message):
        reproduce(output)


@pytest.mark.parametrize("key", ["request", "source_files", "environment", "calibration", "source"])
@pytest.mark.parametrize("value", [5, "words", [1, {}]])
def test_a_part_of_another_kind_is_named(key: str, value: object, output: Path) -> None:
    edit(output, lambda content: content.update({key: value}))
    with pytest.raises(InputError, match=f"{key} must be an object"):
        reproduce(output)


@pytest.mark.parametrize("key", ["request", "source_files", "environment", "calibration", "source"])
def test_a_manifest_that_lacks_a_part_ends_in_a_sentence_or_is_enough(key: str, output: Path) -> None:
    edit(output, lambda content: content.pop(key))
    if key in ("request", "source_files"):
        with pytest.raises(InputError):
            reproduce(output)
    else:
        assert {difference.kind for difference in reproduce(output).differences} <= {"changed"}


def test_the_command_says_what_was_and_was_not_compared(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", str(output)]) == 0
    out = capsys.readouterr().out
    assert "byte for byte the same" in out
    assert "not compared: timings, environment and metrics in aphroquant.json, README.md" in out
    edit(output, lambda content: content["request"].update(group_size=32))
    assert run(["reproduce", str(output), "--json", "-"]) == 4
    assert json.loads(capsys.readouterr().out)["is_same"] is False


def test_a_directory_of_single_files_names_them(gguf: Path) -> None:
    with pytest.raises(InputError) as caught:
        reproduce(gguf.parent)
    assert caught.value.hint == f"give the file itself: {gguf}"
