"""aphroquant.json: how a checkpoint was made. Everything but `timings` and `environment` repeats exactly."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

import aphroquant
from aphroquant.calibration.data import CalibrationData
from aphroquant.checkpoint.hashes import FileRecord
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult

FILE_NAME = "aphroquant.json"


def manifest(
    request: ConversionRequest,
    result: ConversionResult,
    data: CalibrationData | None,
    timings: dict[str, float],
    *,
    source_files: Mapping[str, FileRecord],
    files: Mapping[str, FileRecord],
) -> dict[str, Any]:
    """The content of the file. Paths are left as the user gave them; `inspect --verify` looks at `files` again."""
    described = result.to_dict()
    for measured in ("seconds", "peak_memory_bytes", "dry_run", "out"):
        described.pop(measured)
    return {
        "aphroquant": aphroquant.__version__,
        "request": _arguments(request),
        "calibration": None if data is None else _calibration(data),
        "result": described,
        "source_files": {name: record._asdict() for name, record in source_files.items()},
        "files": {name: record._asdict() for name, record in files.items()},
        "timings": {
            "seconds": round(result.seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
            "stages": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        },
        "environment": _environment(),
    }


def _arguments(request: ConversionRequest) -> dict[str, Any]:
    return {
        "source": request.source,
        "to": request.to,
        "scheme": request.scheme,
        "bits": request.bits,
        "group_size": request.group_size,
        "symmetric": request.symmetric,
        "solver": request.solver,
        "calibration": [str(path) for path in request.calibration],
        "samples": request.samples,
        "seq_len": request.seq_len,
        "seed": request.seed,
        "ignore": list(request.ignore),
        "requantize": request.requantize,
        "effort": request.effort,
        "refine_steps": request.refine_steps,
        "distill_steps": request.distill_steps,
        "rules": [rule.to_dict() for rule in request.rules],
    }


def _calibration(data: CalibrationData) -> dict[str, Any]:
    return {
        "sources": [{"name": source.name, "sha256": source.sha256} for source in data.sources],
        "windows": list(data.windows.shape),
        "tokens_available": data.num_tokens,
        "windows_sha256": data.sha256,
    }


def _environment() -> dict[str, Any]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }
