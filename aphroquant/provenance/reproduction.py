"""reproduce(): run a recorded conversion again, elsewhere, and compare what it writes byte by byte.

Compared are the files that the manifest names: tensors, configuration, tokenizer, everything carried over; and what
the manifest says of calibration and result. Not compared: `timings`, `environment` and `metrics` of the manifest,
README.md, which has the metrics too, and the check sums of those two.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aphroquant
from aphroquant.conversion.progress import Progress
from aphroquant.errors import GateError, InputError
from aphroquant.provenance.inputs import calibration_texts, changes, opened_source, recorded_request
from aphroquant.provenance.records import CARD, OutputRecord, records_of_files
from aphroquant.provenance.verification import FileDifference, verify_files

NOT_COMPARED = "timings, environment and metrics in aphroquant.json, README.md, SHA256SUMS"
_COMPARED = ("calibration", "result")


@dataclass(frozen=True)
class Reproduction:
    """What came of it. `changes` are the versions and hardware that are not what they were, in words."""

    path: str
    num_files: int
    differences: tuple[FileDifference, ...]
    changes: tuple[str, ...]
    seconds: float

    @property
    def is_same(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "is_same": self.is_same, "not_compared": NOT_COMPARED}


def reproduce(
    path: str | Path,
    *,
    source: str | Path | None = None,
    calibration: Sequence[str | Path] = (),
    any_versions: bool = False,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> Reproduction:
    """Convert again what `path`, a directory or a .gguf file, was made from, in a temporary directory in `work`.

    `source` and `calibration` say where those are now. InputError if the source, the calibration texts or the settings
    are not what they were, or if versions and hardware that decide bytes differ without `any_versions`. GateError if
    the files of `path` themselves are not those that were recorded.
    """
    record = OutputRecord(Path(path).expanduser())
    if not record.manifest_path.exists():
        files = [str(found.path) for found in records_of_files(record.path)] if record.path.is_dir() else []
        raise InputError(
            f"{record.path}: there is no {record.manifest_path.name}, which would say how it was made",
            hint=f"give the file itself: {' or '.join(files)}" if files else "give what aphroquant convert has written",
        )
    others = tuple(changes(record))
    if others and not any_versions:
        raise InputError(
            f"{record.path}: cannot be reproduced here: {'; '.join(others)}",
            hint="install those versions, or let these try: --any-versions",
        )
    _check_files(record)
    request = recorded_request(record)
    checkpoint = opened_source(record, str(source or request["source"]))
    request["calibration"] = calibration_texts(record, calibration or request["calibration"])
    with tempfile.TemporaryDirectory(prefix="aphroquant-reproduce-", dir=work) as folder:
        out = Path(folder) / "again" / record.path.name
        named = _under_its_name(checkpoint.path, request["source"], Path(folder) / "source")
        with _threads(record):
            made = aphroquant.convert(**{**request, "source": named}, out=out, progress=progress)
        again = OutputRecord(out)
        differences = (*_file_differences(record, again), *_section_differences(record, again))
        return Reproduction(str(path), len(record.hashes), tuple(differences), others, made.seconds)


def _under_its_name(path: Path, source: str, folder: Path) -> Path:
    """The source under the name that it had, which a GGUF file made of it holds. A file stays among its neighbours."""
    if path.is_file():
        return path
    folder.mkdir()
    link = folder / (Path(source.rstrip("/")).name or path.name)
    link.symlink_to(path.absolute())
    return link


def _check_files(record: OutputRecord) -> None:
    """Nothing is proved of files that are others by now."""
    changed = [found for found in verify_files(record.path).differences if found.file in record.hashes]
    if changed:
        raise GateError(
            f"{record.path}: {changed[0].file} is not as it was recorded, so that making it again proves nothing",
            hint="aphroquant verify says what differs",
        )


def _threads(record: OutputRecord) -> _Threads:
    recorded = record.section("environment").get("threads")
    return _Threads(recorded if isinstance(recorded, int) else None)


class _Threads:
    """As many threads as then, if this machine has as many processors: sums depend on how they are divided."""

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._before = 0

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        if self._count is not None and 1 <= self._count <= (os.cpu_count() or 1):
            torch.set_num_threads(self._count)

    def __exit__(self, *error: object) -> None:
        import torch

        torch.set_num_threads(self._before)


def _file_differences(record: OutputRecord, again: OutputRecord) -> Iterator[FileDifference]:
    for name in sorted({*record.hashes, *again.hashes} - {CARD}):
        if name not in again.hashes:
            yield FileDifference(name, "missing", "was not written again")
        elif name not in record.hashes:
            yield FileDifference(name, "extra", "was not written then")
        elif record.hashes[name] != again.hashes[name]:
            then, now = record.tensor_sums(name), again.tensor_sums(name)
            tensors = tuple(tensor for tensor in then if then[tensor] != now.get(tensor))
            message = f"its SHA-256 was {record.hashes[name]} and is {again.hashes[name]} now"
            yield FileDifference(name, "changed", message, tensors)


def _section_differences(record: OutputRecord, again: OutputRecord) -> Iterator[FileDifference]:
    """What the manifests say differently of calibration and result, but for paths as the user gave them."""
    for section in _COMPARED:
        then, now = (_without_paths(found.section(section)) for found in (record, again))
        if then != now:
            keys = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
            place = f"{record.manifest_path.name}: {section}"
            yield FileDifference(place, "changed", f"differs in {', '.join(keys)}")


def _without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in section.items() if key not in ("source", "sources", "notes", "warnings")}
    return plain | {"sources": [source.get("sha256") for source in section.get("sources", [])]}
