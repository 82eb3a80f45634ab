"""Where outputs go: a directory, the Hub, or what fsspec knows. Each is found out to be possible before any work."""

from __future__ import annotations

import importlib.util
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aphroquant.checkpoint.disk import check_parents, fsync, telling_disk_errors
from aphroquant.checkpoint.leftovers import partial_path, remove_leftovers, replaced_path
from aphroquant.errors import InputError, UsageError
from aphroquant.provenance.records import CARD, OutputRecord, find_records
from aphroquant.recipes.models import Publish, Recipe
from aphroquant.recipes.requests import resolved, resolved_source

_HUB = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Target(ABC):
    """A place for some outputs. `inputs` are the settings that decide what is done there."""

    place: str
    outputs: tuple[str, ...]
    settings: Publish

    @property
    def inputs(self) -> dict[str, Any]:
        return {"place": self.place, **self.settings.model_dump()}

    @abstractmethod
    def publish(self, outputs: Mapping[str, Path]) -> dict[str, Any]:
        """Put outputs there; what is worth remembering of it."""

    def is_there(self, found: Mapping[str, Any]) -> bool:
        """Whether what was published is still there, as far as it can be known at no cost."""
        return True


class DirectoryTarget(Target):
    """A directory, that appears when it is complete."""

    def publish(self, outputs: Mapping[str, Path]) -> dict[str, Any]:
        target = Path(self.place).resolve()
        partial = partial_path(target)
        with telling_disk_errors(target, lambda: 0):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            try:
                files = _copied(outputs, partial)
                _put_in_place(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return {"files": files}

    def is_there(self, found: Mapping[str, Any]) -> bool:
        files = found.get("files")
        if not isinstance(files, dict):
            return False
        paths = {name: Path(self.place) / name for name in files}
        return all(path.is_file() and path.stat().st_size == files[name] for name, path in paths.items())


class HubTarget(Target):
    """A repository of the Hugging Face Hub. The token is huggingface_hub's own: HF_TOKEN, or `hf auth login`."""

    def publish(self, outputs: Mapping[str, Path]) -> dict[str, Any]:
        from huggingface_hub import HfApi

        repository, api = self.place.removeprefix(_HUB), HfApi()
        branch = self.settings.revision
        try:
            api.create_repo(repository, repo_type="model", private=self.settings.private, exist_ok=True)
            if branch is not None:
                api.create_branch(repository, branch=branch, exist_ok=True)
            commits = [self._upload(api, repository, folder, output) for folder, output in _folders(outputs).items()]
        except Exception as error:  # the HTTP library behind huggingface_hub, and so its errors, differ by version
            raise InputError(
                f"{self.place}: the Hugging Face Hub did not take it ({type(error).__name__}: {error})",
                hint="set HF_TOKEN, or run: hf auth login; check the network and the repository's name",
            ) from error
        return {"commits": commits, "url": f"https://huggingface.co/{repository}"}

    def _upload(self, api: Any, repository: str, folder: str, output: Path) -> str:
        names = [path.name for path in files_of(output).values()] if output.is_file() else None
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(output if output.is_dir() else output.parent),
            path_in_repo=folder or None,
            revision=self.settings.revision,
            allow_patterns=names,
            commit_message=f"Upload {output.name}, made by aphroquant",
        )
        return str(commit.oid)


class FilesystemTarget(Target):
    """What fsspec knows by a URL: s3://, gs://, az://, sftp://, memory:// ..."""

    def publish(self, outputs: Mapping[str, Path]) -> dict[str, Any]:
        fsspec: Any = importlib.import_module("fsspec")
        try:
            system, root = fsspec.core.url_to_fs(self.place)
            for folder, output in _folders(outputs).items():
                for name, path in files_of(output).items():
                    _put(system, path, "/".join(part for part in (root.rstrip("/"), folder, name) if part))
        except InputError:
            raise
        except Exception as error:  # each of its file systems has errors of its own
            raise InputError(f"{self.place}: cannot be written to ({type(error).__name__}: {error})") from error
        return {}


def targets_of(recipe: Recipe, directory: Path | None) -> list[Target]:
    """The recipe's targets. UsageError for one that cannot be written to, as far as it can be known."""
    targets = [_target(place, tuple(place.outputs or recipe.outputs), directory) for place in recipe.publish]
    source = Path(resolved_source(recipe.source or "", directory)).resolve()
    for target in targets:
        place = Path(target.place).resolve()
        if not isinstance(target, DirectoryTarget) or not recipe.source:
            continue
        if place == source or place in source.parents:
            raise UsageError(f"publish to {target.place}: holds the source model", hint="give a directory of its own")
        if source in place.parents:
            raise UsageError(f"publish to {target.place}: is inside the source model", hint="give a place outside")
    return targets


def _target(place: Publish, outputs: tuple[str, ...], directory: Path | None) -> Target:
    if place.to.startswith(_HUB):
        if not _REPOSITORY.fullmatch(place.to.removeprefix(_HUB)):
            raise UsageError(f"publish to {place.to}: is no repository of the Hub", hint="as hf://org/name")
        return HubTarget(place.to, outputs, place)
    if "://" in place.to:
        _check_filesystem(place.to)
        return FilesystemTarget(place.to, outputs, place)
    path = resolved(place.to, directory)
    check_parents(path.resolve())
    if path.exists() and not path.is_dir():
        raise UsageError(f"publish to {path}: is not a directory")
    stranger = _stranger(path, outputs) if path.is_dir() else None
    if stranger is not None:
        raise UsageError(
            f"publish to {path}: has files in it that aphroquant has not published, as {stranger}",
            hint="what is published replaces the whole directory: give one of its own, or empty it",
        )
    return DirectoryTarget(str(path), outputs, place)


def files_of(output: Path) -> dict[str, Path]:
    """What is published of an output, by the names it has there."""
    if output.is_dir():
        return {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    record = OutputRecord(output)
    beside = (record.manifest_path, record.sums_path, record.directory / CARD)
    return {path.name: path for path in (output, *beside) if path.is_file()}


def _folders(outputs: Mapping[str, Path]) -> dict[str, Path]:
    """Outputs by the folder they go to: one alone has none, each of several its own."""
    return {"" if len(outputs) == 1 else name: output for name, output in outputs.items()}


def _copied(outputs: Mapping[str, Path], target: Path) -> dict[str, int]:
    """Copies, and their sizes by name."""
    sizes = {}
    for folder, output in _folders(outputs).items():
        for name, path in files_of(output).items():
            copy = target / folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            fsync(copy)
            sizes[copy.relative_to(target).as_posix()] = copy.stat().st_size
    return sizes


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    replaced = replaced_path(target)
    target.rename(replaced)
    try:
        partial.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _put(system: Any, path: Path, target: str) -> None:
    system.makedirs(target.rpartition("/")[0], exist_ok=True)
    system.put_file(str(path), target)
    size = system.info(target)["size"]
    if size != path.stat().st_size:
        raise InputError(f"{target}: has {size} bytes there, and {path} has {path.stat().st_size}")


def _check_filesystem(url: str) -> None:
    hint = "pip install 'aphroquant[publish]', and what its file system needs"
    if importlib.util.find_spec("fsspec") is None:
        raise UsageError(f"publish to {url}: fsspec is not installed", hint=hint)
    fsspec: Any = importlib.import_module("fsspec")
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except (ValueError, ImportError) as error:
        raise UsageError(f"publish to {url}: {error}", hint=hint) from error


def _stranger(directory: Path, outputs: Collection[str]) -> str | None:
    """Something in it that is no part of an earlier publication of these outputs; None if there is nothing else."""
    if _records(directory):
        return _unrecorded(directory)
    for path in sorted(directory.iterdir()):
        if not (_is_folder(path) and path.name in outputs and _records(path)):
            return path.name
        strange = _unrecorded(path)
        if strange is not None:
            return f"{path.name}/{strange}"
    return None


def _unrecorded(directory: Path) -> str | None:
    """A file that the records there do not name."""
    known: set[str] = {CARD}
    for record in _records(directory):
        beside = (record.manifest_path, record.sums_path, record.signature_path)
        known |= {record.path.name, *(path.name for path in beside), *record.hashes}
    files = (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if not _is_folder(path))
    return next((name for name in files if name not in known), None)


def _records(directory: Path) -> list[OutputRecord]:
    """Of what an output's directory holds; none if it is something else."""
    try:
        return find_records(directory)
    except InputError:
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
