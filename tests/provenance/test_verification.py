"""`aphroquant verify` says exactly which files, and which of their tensors, are not as they were written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.cli import run
from aphroquant.errors import InputError
from aphroquant.provenance.records import OutputRecord
from aphroquant.provenance.verification import FileDifference, verify_files

DOWN = "model.layers.1.mlp.down_proj.qweight"


def only(path: Path) -> FileDifference:
    (difference,) = verify_files(path).differences
    return difference


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_an_output_is_as_recorded_and_coreutils_agrees(output: Path, gguf: Path) -> None:
    for path in (output, gguf):
        found = verify_files(path)
        assert found.passed
        assert found.num_bytes > 1000
        sums = OutputRecord(path).sums_path
        subprocess.run(
            ["sha256sum", "--check", "--strict", sums.name], cwd=sums.parent, check=True, capture_output=True
        )


def test_the_record_names_every_file_of_the_directory(output: Path) -> None:
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert set(OutputRecord(output).sums) == files - {"SHA256SUMS"}


def test_a_changed_tensor_is_named(output: Path) -> None:
    path = output / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    difference = only(output)
    assert (difference.file, difference.kind, difference.tensors) == ("model.safetensors", "changed", (DOWN,))


def test_every_tensor_of_a_gguf_file_is_found_where_its_bytes_differ(gguf: Path) -> None:
    whole = gguf.read_bytes()
    for name, tensor in read_gguf_header(gguf).tensors.items():
        flip(gguf, tensor.begin + tensor.nbytes - 1)
        assert only(gguf).tensors == (name,)
        gguf.write_bytes(whole)


def test_a_tensor_that_is_gone_or_new_is_named(output: Path) -> None:
    path = output / "model.safetensors"
    tensors = load_file(path)
    tensors["surplus"] = tensors.pop(DOWN)
    save_file(tensors, path, metadata={"format": "pt"})
    assert f"the tensor {DOWN} is missing; the tensor surplus is new" in only(output).message


def test_another_header_with_the_same_tensors_is_told_as_such(output: Path) -> None:
    path = output / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "more": "words"})
    assert "names, shapes, types or metadata in its header differ" in only(output).message


def test_a_truncated_file_is_changed(output: Path, gguf: Path) -> None:
    for path, place in ((output / "model.safetensors", output), (gguf, gguf)):
        path.write_bytes(path.read_bytes()[:-9])
        assert "its tensors cannot be told apart: " in only(place).message


def test_missing_extra_and_special_files_are_told(output: Path) -> None:
    (output / "config.json").unlink()
    (output / "tokenizer.json").unlink()
    (output / "tokenizer.json").mkdir()
    (output / "folder").mkdir()
    (output / "folder" / "notes.txt").write_text("mine")
    (output / ".gitattributes").write_text("hidden files are no part of a model")
    found = [(difference.file, difference.kind) for difference in verify_files(output).differences]
    assert found == [("config.json", "missing"), ("tokenizer.json", "changed"), ("folder/notes.txt", "extra")]


def test_hashes_that_contradict_each_other_are_told(output: Path) -> None:
    flip(output / "config.json", 0)
    sums = output / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if not line.endswith("config.json\n")))
    listed = subprocess.run(["sha256sum", "config.json"], cwd=output, check=True, capture_output=True, text=True)
    sums.write_text(sums.read_text() + listed.stdout)
    kinds = {difference.kind for difference in verify_files(output).differences if difference.file == "config.json"}
    assert kinds == {"contradiction", "changed"}


def test_a_gguf_file_may_have_another_name_by_now(gguf: Path) -> None:
    for path in list(gguf.parent.iterdir()):
        path.rename(path.with_name(path.name.replace("Tiny", "Other")))
    assert verify_files(gguf.with_name("Other.gguf")).passed
    assert verify_files(gguf.parent).passed


def test_what_nobody_recorded_cannot_be_verified(source: Path, tmp_path: Path) -> None:
    for path in (source, source / "config.json", tmp_path / "nowhere"):
        with pytest.raises(InputError):
            verify_files(path)


@pytest.mark.parametrize("files", [[], {"../../etc/passwd": "0" * 64}, {"config.json": 5}])
def test_records_that_make_no_sense_are_refused(files: object, output: Path) -> None:
    (output / "aphroquant.json").write_text(json.dumps({"files": files}))
    with pytest.raises(InputError, match=r"aphroquant\.json"):
        verify_files(output)


def test_the_command_ends_with_4_and_names_what_differs(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(output)]) == 0
    assert "all as recorded" in capsys.readouterr().out
    flip(output / "model.safetensors", -1)
    assert run(["verify", str(output), "--json", "-"]) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["differences"][0]["kind"] == "changed"
    assert "1 file is not as recorded" in captured.err
    assert run(["verify", str(output)]) == 4
    assert "changed   model.safetensors: its SHA-256 is " in capsys.readouterr().out


def test_a_link_into_a_cache_is_followed(output: Path, tmp_path: Path) -> None:
    shutil.move(output / "model.safetensors", tmp_path / "blob")
    (output / "model.safetensors").symlink_to(tmp_path / "blob")
    assert verify_files(output).passed
