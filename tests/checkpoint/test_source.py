import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion import convert
from aphroquant.errors import InputError, UsageError


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_path_with_a_slip_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "smollm2-awq").mkdir()
    with pytest.raises(InputError, match="no such file or directory") as caught:
        open_checkpoint(tmp_path / "smolm2-awq")
    assert caught.value.hint == f"did you mean {tmp_path / 'smollm2-awq'}?"


def test_nonsense_is_neither_a_path_nor_an_id() -> None:
    with pytest.raises(InputError, match="not a Hugging Face id") as caught:
        open_checkpoint("no such thing")
    assert "org/name" in (caught.value.hint or "")


def test_a_hub_id_without_a_network_is_an_input_error_with_a_way_out() -> None:
    with pytest.raises(InputError, match="the Hugging Face Hub did not give it") as caught:
        open_checkpoint("organisation/no-such-model-anywhere")
    assert caught.value.exit_code == 3
    assert "check the network" in (caught.value.hint or "")


def test_a_relative_path_that_looks_like_an_id_suggests_the_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_checkpoint("models/smollm")
    assert "did you mean the path models/smollm2?" in (caught.value.hint or "")


def test_a_hub_snapshot_is_opened_as_a_directory(tiny_checkpoint: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint("llama")  # type: ignore[operator]
    asked: dict[str, object] = {}

    def snapshot_download(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert checkpoint.source == "org/name"
    assert checkpoint.path == path
    assert asked["revision"] == "v1"
    assert not any(str(pattern).endswith((".bin", ".py", ".pt")) for pattern in asked["allow_patterns"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["config.json", "notes.md"])
def test_a_file_that_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"is not a checkpoint|neither a directory nor"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_working_directory(name: str) -> None:
    with pytest.raises(UsageError, match="no checkpoint is given: its name is empty") as caught:
        open_checkpoint(name)
    assert "org/name" in (caught.value.hint or "")


def test_a_directory_without_config_says_what_may_have_been_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is an empty directory"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    found = {"notes.txt": "the directory that holds"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found["model"] = f"did you mean {tmp_path / 'model'}?"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found["model.gguf"] = f"give the file itself: {tmp_path / 'model.gguf'}"
    for name, hint in reversed(found.items()):
        with pytest.raises(InputError, match="so that it is no checkpoint") as caught:
            open_checkpoint(tmp_path)
        assert hint in (caught.value.hint or "")
        shutil.rmtree(tmp_path / name) if name == "model" else (tmp_path / name).unlink()


def test_a_lone_file_of_an_unknown_model_can_be_looked_at_but_not_converted(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lone = tmp_path / "weights.safetensors"
    shutil.copy(tiny_checkpoint("llama") / "model.safetensors", lone)
    assert open_checkpoint(lone).tensors
    with pytest.raises(InputError, match="what model its tensors are") as caught:
        convert(lone, to="awq", out=tmp_path / "out", solver="rtn", samples=0)
    assert "give the model's directory" in (caught.value.hint or "")


def test_one_shard_of_several_is_told_from_an_incomplete_download(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    tensors = load_file(source / "model.safetensors")
    shard = tmp_path / "model-00001-of-00002.safetensors"
    save_file(dict(list(tensors.items())[:4]), shard)
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(InputError, match="is missing, and so are") as caught:
        convert(shard, to="awq", out=tmp_path / "out", solver="rtn", samples=0)
    assert caught.value.hint == f"the file is one of several; give the directory: {tmp_path}"


def test_an_empty_name_of_the_output_is_not_the_working_directory(tiny_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="--out is empty"):
        convert(tiny_checkpoint("llama"), to="awq", out="", overwrite=True)
