"""What a conversion was made from, found again: its settings, source, calibration texts, versions. Or why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.errors import InputError
from aphroquant.provenance.environment import PACKAGES, environment
from aphroquant.provenance.records import OutputRecord
from aphroquant.provenance.verification import sha256_of

_DECIDE = ("python", *PACKAGES, "torch_instruction_set", "kernels_instruction_set", "device", "gpu")
_BUNDLED = "default: "
_BUNDLED_WORD = "default"  # that stands for the bundled texts among others


def changes(record: OutputRecord) -> Iterator[str]:
    """What decides bytes here, versions and hardware, and is not as it was; in words."""
    device = record.section("request").get("device")
    here = {"aphroquant": aphroquant.__version__, **environment("cpu" if device == "cpu" else "auto")}
    recorded = {**record.section("environment"), "aphroquant": record.manifest.get("aphroquant")}
    for name in ("aphroquant", *_DECIDE):
        if name in recorded and recorded[name] != here[name]:
            yield f"{name.replace('_', ' ')} is {_told(here[name])} here and was {_told(recorded[name])}"


def _told(value: object) -> str:
    if isinstance(value, dict):
        return f"{value.get('name')} with driver {value.get('driver')}"
    return "none" if value is None else str(value)


def recorded_request(record: OutputRecord) -> dict[str, Any]:
    """The arguments of convert(), checked. InputError naming one that is unknown or of a wrong type."""
    from pydantic import TypeAdapter, ValidationError

    from aphroquant.conversion.request import ConversionRequest

    told, known = record.section("request"), ConversionRequest.__dataclass_fields__
    for name in told:
        if name not in known:
            raise InputError(f"{record.manifest_path}: request: {name} is no setting that this release knows")
    try:
        found = TypeAdapter(ConversionRequest).validate_python({**told, "out": Path()})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("request", *first["loc"])))
        raise InputError(f"{record.manifest_path}: {place}: {first['msg']}") from error
    return {name: getattr(found, name) for name in known if name not in ("out", "overwrite")}


def opened_source(record: OutputRecord, source: str) -> Checkpoint:
    """The source, each file of it what it was. InputError saying what is not."""
    checkpoint = _opened(record, source)
    _check_source(record, checkpoint)
    return checkpoint


def _opened(record: OutputRecord, source: str) -> Checkpoint:
    repository, revision = (record.section("source").get(key) for key in ("repository", "revision"))
    try:
        if isinstance(repository, str) and isinstance(revision, str) and source == repository:
            return open_checkpoint(source, revision=revision)
        return open_checkpoint(source)
    except InputError as error:
        raise InputError(
            f"{record.path}: cannot be reproduced: the source cannot be read: {error.message}",
            hint="say where it is: --source",
        ) from error


def _check_source(record: OutputRecord, checkpoint: Checkpoint) -> None:
    """InputError for the first file that is not what was read then."""
    recorded, files = record.section("source_files"), checkpoint.files()
    if not recorded:
        raise InputError(f"{record.manifest_path}: source_files says nothing of what was read")
    if checkpoint.path.is_file() and len(recorded) == len(files) == 1:  # which may have another name by now
        recorded = dict(zip(files, recorded.values(), strict=True))
    for name, entry in recorded.items():
        wanted = entry.get("sha256") if isinstance(entry, dict) else None
        if name not in files:
            raise _differs(record, checkpoint, f"{name} is not there")
        if sha256_of(files[name]) != wanted:
            raise _differs(record, checkpoint, f"the SHA-256 of {name} is not the recorded {wanted}")
    added = [name for name in files if name not in recorded]
    if added:
        raise _differs(record, checkpoint, f"{added[0]} was not there")


def _differs(record: OutputRecord, checkpoint: Checkpoint, reason: str) -> InputError:
    return InputError(
        f"{record.path}: cannot be reproduced: the source {checkpoint.path} is not what it was: {reason}",
        hint="say where the one that was converted is: --source",
    )


def calibration_texts(record: OutputRecord, paths: Sequence[str | Path]) -> list[Path]:
    """The texts, in the recorded order. InputError for one that is gone or not what it was."""
    files = [Path(path) for path in paths]
    recorded = record.section("calibration").get("sources") or []
    if not isinstance(recorded, list) or not all(isinstance(source, dict) for source in recorded):
        raise InputError(f"{record.manifest_path}: calibration.sources must be a list of objects")
    read = list(_in_order(recorded, files))
    if len(read) != len(recorded):
        raise InputError(
            f"{record.path}: cannot be reproduced: it was calibrated on {len(recorded)} texts, not on {len(read)}",
            hint="give them in the order of aphroquant.json: --calibration",
        )
    for path, source in zip(read, recorded, strict=True):
        try:
            same = sha256_of(path) == source.get("sha256")
        except InputError as error:
            raise InputError(
                f"{record.path}: cannot be reproduced: the calibration text {error.message}",
                hint="say where it is: --calibration",
            ) from error
        if not same:
            raise InputError(
                f"{record.path}: cannot be reproduced: the calibration text {path} is not what it was",
                hint="give the text with the recorded SHA-256: --calibration",
            )
    return files


def _in_order(recorded: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> Iterator[Path]:
    """Where the recorded texts are: bundled ones in the package, the others as they are given."""
    given = iter([path for path in files if str(path) != _BUNDLED_WORD])
    for source in recorded:
        name = str(source.get("name"))
        if name.startswith(_BUNDLED):
            yield DEFAULT_TEXTS / name.removeprefix(_BUNDLED)
        elif (path := next(given, None)) is not None:
            yield path
    yield from given if recorded else ()
