"""Publishing to directories, to what fsspec knows, and to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from aphroquant.errors import InputError, UsageError
from aphroquant.pipeline.publish import targets_of
from aphroquant.recipes.loading import load_recipe


@pytest.fixture
def outputs(tmp_path: Path) -> dict[str, Path]:
    """A directory and a single file, as conversions make them."""
    awq, gguf = tmp_path / "made" / "awq", tmp_path / "made" / "model.gguf"
    awq.mkdir(parents=True)
    for path, record in ((awq / "config.json", awq / "aphroquant.json"), (gguf, Path(f"{gguf}.aphroquant.json"))):
        path.write_text(path.name)
        record.write_text(json.dumps({"files": {path.name: {"sha256": "0" * 64}}}))
    (tmp_path / "made" / "of others").write_text("")
    return {"awq": awq, "gguf": gguf}


def target(tmp_path: Path, to: str, **settings: Any) -> Any:
    recipe = {"outputs": {"awq": {"to": "awq"}, "gguf": {"to": "gguf"}}, "publish": [{"to": to, **settings}]}
    (found,) = targets_of(load_recipe(json.dumps(recipe)), tmp_path)
    return found


def test_a_directory_is_complete_and_replaced_as_a_whole(outputs: dict[str, Path], tmp_path: Path) -> None:
    place = target(tmp_path, "released")
    found = place.publish(outputs)
    released = tmp_path / "released"
    names = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    assert names == {
        "awq/config.json",
        "awq/aphroquant.json",
        "gguf/model.gguf",
        "gguf/model.gguf.aphroquant.json",
    }
    assert place.is_there(found)
    (released / "awq" / "config.json").unlink()
    assert not place.is_there(found)
    target(tmp_path, "released").publish({"awq": outputs["awq"]})
    assert sorted(path.name for path in released.iterdir()) == ["aphroquant.json", "config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "released"]


@pytest.mark.parametrize("stranger", ["notes.txt", "awq/notes.txt", "gguf/other.gguf", "their model/config.json"])
def test_a_directory_with_anything_else_in_it_is_not_replaced(
    outputs: dict[str, Path], tmp_path: Path, stranger: str
) -> None:
    target(tmp_path, "released").publish(outputs)
    target(tmp_path, "released")
    path = tmp_path / "released" / stranger
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(UsageError, match="has files in it that aphroquant has not published, as "):
        target(tmp_path, "released")


def test_models_made_by_aphroquant_that_are_no_outputs_of_the_recipe_are_not_replaced(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    target(tmp_path, "models").publish({"another": outputs["awq"], "awq": outputs["awq"]})
    with pytest.raises(UsageError, match="as another"):
        target(tmp_path, "models")


def test_the_source_is_not_replaced(outputs: dict[str, Path], tmp_path: Path) -> None:
    for place, message in (("made/awq", "holds the source model"), ("made/awq/released", "is inside the source model")):
        recipe = {"source": "made/awq", "outputs": {"a": {"to": "gptq"}}, "publish": [{"to": place}]}
        with pytest.raises(UsageError, match=message):
            targets_of(load_recipe(json.dumps(recipe)), tmp_path)


def test_any_file_system_that_fsspec_knows_is_a_target(outputs: dict[str, Path], tmp_path: Path) -> None:
    target(tmp_path, "memory://bucket/release").publish(outputs)
    system = fsspec.filesystem("memory")
    assert system.cat("/bucket/release/awq/config.json") == b"config.json"
    assert system.cat("/bucket/release/gguf/model.gguf") == b"model.gguf"


def test_the_hub_gets_a_repository_a_branch_and_a_commit_for_each_output(
    outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append(("create_repo", {"repository": repository, **options}))

        def create_branch(self, repository: str, **options: Any) -> None:
            calls.append(("create_branch", options))

        def upload_folder(self, **options: Any) -> Any:
            calls.append(("upload_folder", options))
            return SimpleNamespace(oid="abc")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    found = target(tmp_path, "hf://org/model", private=True, revision="v2").publish(outputs)
    assert found == {"commits": ["abc", "abc"], "url": "https://huggingface.co/org/model"}
    assert [name for name, _ in calls] == ["create_repo", "create_branch", "upload_folder", "upload_folder"]
    assert calls[0][1]["private"] is True
    assert calls[2][1]["path_in_repo"] == "awq"
    assert calls[3][1]["allow_patterns"] == ["model.gguf", "model.gguf.aphroquant.json"]


def test_what_the_hub_refuses_is_an_input_error(
    outputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError("401")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refused)
    with pytest.raises(InputError, match="hf://org/model: the Hugging Face Hub did not take it") as caught:
        target(tmp_path, "hf://org/model").publish(outputs)
    assert "HF_TOKEN" in (caught.value.hint or "")
