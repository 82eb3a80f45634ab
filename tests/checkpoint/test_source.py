from pathlib import Path

import pytest

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError


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
