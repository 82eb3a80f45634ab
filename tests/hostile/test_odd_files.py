"""What stands in the place of a file: pipes, devices, links out of the checkpoint, and files too large to parse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.carried import carried_files
from aphroquant.checkpoint.files import MAX_JSON_BYTES
from aphroquant.errors import InputError

NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "quantize_config.json")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint(), tmp_path / "model"))


def put_in_place(path: Path, kind: str) -> None:
    if path.name == "model.safetensors.index.json":
        path.with_name("model.safetensors").unlink()
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path.name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to itself"])
def test_what_is_no_file_is_refused_and_not_waited_for(name: str, kind: str, model: Path) -> None:
    put_in_place(model / name, kind)
    message = {"pipe": "is a pipe, not a file", "device": "is a device, not a file"}.get(kind, r"model")
    if name == "quantize_config.json" and kind == "link to itself":
        return  # it leads nowhere, as if it were not there
    with pytest.raises(InputError, match=message):
        open_checkpoint(model).schemes()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_so_are_the_files_of_the_tokenizer(name: str, kind: str, model: Path) -> None:
    put_in_place(model / name, kind)
    with pytest.raises(InputError, match=name if kind != "directory" else "model"):
        open_checkpoint(model).tokenizer()


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_pipe_given_as_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a pipe, not a file"):
        open_checkpoint(tmp_path / name)


def test_a_config_too_large_to_parse_is_refused_unread(model: Path) -> None:
    with (model / "config.json").open("r+b") as file:
        file.truncate(2**40)  # a hole: no byte of it is stored
    with pytest.raises(InputError, match=rf"is {2**40} bytes long; at most {MAX_JSON_BYTES} are read"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", 1, None, ["a"]]
)
def test_an_index_names_only_files_beside_it(file: Any, model: Path) -> None:
    (model / "model.safetensors").rename(model / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": file}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"must be the name of a \.safetensors file in the same directory|is missing"):
        open_checkpoint(model)


def test_a_link_to_a_private_file_is_not_copied_into_the_result(model: Path, tmp_path: Path) -> None:
    secret = tmp_path / "credentials"
    secret.write_text("secret")
    (model / "LICENSE").symlink_to(secret)
    with pytest.raises(InputError, match=r"LICENSE: is a link to .*credentials, outside the checkpoint"):
        aphroquant.convert(model, to="gptq", samples=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_into_the_hub_cache_within_the_model_and_by_the_same_name_are_followed(tmp_path: Path) -> None:
    snapshot, blobs, disk = (tmp_path / name for name in ("models--a--b/snapshots/c", "models--a--b/blobs", "disk"))
    for folder in (snapshot, blobs, disk):
        folder.mkdir(parents=True)
    (blobs / "0123").write_text("{}")
    (disk / "NOTICE").write_text("text")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0123")
    (snapshot / "NOTICE").symlink_to(disk / "NOTICE")
    (snapshot / "LICENSE.txt").write_text("text")
    (snapshot / "LICENSE").symlink_to("LICENSE.txt")
    assert [path.name for path in carried_files(snapshot)] == ["LICENSE", "LICENSE.txt", "NOTICE", "tokenizer.json"]
