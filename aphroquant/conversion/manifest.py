"""aphroquant.json: how a checkpoint was made. Everything but `timings`, `environment` and `metrics` repeats exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aphroquant
from aphroquant.calibration.data import CalibrationData
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.hashes import FileRecord
from aphroquant.checkpoint.hub import hub_place
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.rules import ModuleRule
from aphroquant.provenance.environment import environment

SCHEMA_VERSION = 2  # 1 had no tensor_crc32, source, device or hardware
_PLACES = ("out", "overwrite")  # of a request: where the result went, and what was there


def manifest(
    request: ConversionRequest,
    result: ConversionResult,
    data: CalibrationData | None,
    timings: dict[str, float],
    *,
    checkpoint: Checkpoint,
    source_files: Mapping[str, FileRecord],
    files: Mapping[str, FileRecord],
    tensor_sums: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The content of the file. Paths are left as the user gave them; `aphroquant verify` looks at `files` again, and
    `aphroquant reproduce` does what `request` says."""
    described = result.to_dict()
    for measured in ("seconds", "peak_memory_bytes", "dry_run", "out"):
        described.pop(measured)
    return {
        "aphroquant": aphroquant.__version__,
        "schema_version": SCHEMA_VERSION,
        "request": request_arguments(request),
        "source": _source(checkpoint),
        "calibration": None if data is None else _calibration(data),
        "result": described,
        "metrics": None,
        "source_files": {name: record._asdict() for name, record in source_files.items()},
        "files": {name: record._asdict() for name, record in files.items()},
        "tensor_crc32": tensor_sums,
        "timings": {
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
            "stages": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        },
        "environment": environment(request.device),
    }


def request_arguments(request: ConversionRequest) -> dict[str, Any]:
    """All that was asked for, but for the place of the result, as JSON holds it."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return {name: _plain(value) for name, value in fields.items() if name not in _PLACES}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, ModuleRule):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the source was: its format and, of the Hub, repository and commit."""
    place = hub_place(checkpoint.path)
    return {
        "format": checkpoint.format_name,
        "repository": place.repository if place else None,
        "revision": place.revision if place else None,
    }


def _calibration(data: CalibrationData) -> dict[str, Any]:
    return {
        "sources": [{"name": source.name, "sha256": source.sha256} for source in data.sources],
        "windows": list(data.windows.shape),
        "tokens_available": data.num_tokens,
        "windows_sha256": data.sha256,
    }
