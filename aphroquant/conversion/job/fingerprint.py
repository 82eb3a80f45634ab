"""What decides the bytes of a conversion. A job whose fingerprint differs is another job."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import aphroquant
from aphroquant.calibration.data import CalibrationData
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.files import opened
from aphroquant.conversion.manifest import request_arguments
from aphroquant.conversion.request import ConversionRequest
from aphroquant.kernels.cpu import library

if TYPE_CHECKING:
    from aphroquant.conversion.conversion import Conversion

Fingerprint = dict[str, Any]

# What computes; the command line, the engine and the server do not.
_PACKAGES = (
    "calibration",
    "checkpoint",
    "conversion",
    "formats",
    "kernels/cpu",
    "kernels/reference",
    "models",
    "schemes",
)
_ENDS = 2**16  # bytes at both ends of a file, which hold a header and whatever changed a length
_NO_MATTER = ("source", "calibration", "device")  # names: what they stand for counts
_SHOWN = 40  # characters of a value in a message


def fingerprint(
    conversions: Sequence[Conversion], checkpoint: Checkpoint, data: CalibrationData, device: torch.device
) -> Fingerprint:
    """Of the conversions of one walk, as JSON holds it."""
    told: Fingerprint = {}
    for number, conversion in enumerate(conversions, 1):
        prefix = f"output {number}: " if len(conversions) > 1 else ""
        told |= {f"{prefix}{name}": value for name, value in _of_output(conversion).items()}
    return {**told, **_shared(checkpoint, data, device)}


def _shared(checkpoint: Checkpoint, data: CalibrationData, device: torch.device) -> Fingerprint:
    """What outputs of one walk have in common."""
    return {
        "calibration windows": data.sha256,
        **{f"file {name}": _identity(path) for name, path in sorted(checkpoint.files().items())},
        "aphroquant": aphroquant.__version__,
        "aphroquant's code": _code(),
        "torch": torch.__version__,
        "device": _device(device),
    }


def of_choice(
    request: ConversionRequest, checkpoint: Checkpoint, data: CalibrationData, device: torch.device
) -> Fingerprint:
    """Of the choice of a request's bits, which is made before there is a job."""
    told = {name: value for name, value in request_arguments(request).items() if name not in _NO_MATTER}
    return {**told, "threads": torch.get_num_threads(), **_shared(checkpoint, data, device)}


def _of_output(conversion: Conversion) -> Fingerprint:
    told = {name: value for name, value in request_arguments(conversion.request).items() if name not in _NO_MATTER}
    plan = conversion.solved_plan
    if plan is None:
        return told
    layers = [f"{module} {scheme} {plan.solvers[module].name}" for module, scheme in plan.schemes.items()]
    steps = {"steps of refinement": plan.refine_steps, "steps of distillation": plan.distill_steps}
    return {**told, **steps, "schemes": _digest("\n".join(layers).encode())}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first thing that differs, in words; None if nothing does."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        shown = [str(value) for value in (old, new)]
        if name.startswith("file ") or max(map(len, shown)) > _SHOWN:
            return f"{name} is another"
        return f"{name} was {shown[0]}, and is {shown[1]} now"
    return None


def _identity(path: Path) -> str:
    """Size, time of the last change, and a hash of both ends: to hash all of a model takes minutes."""
    with opened(path) as (file, size):
        start = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        ends = _digest(start + file.read(_ENDS))
        return f"{size} bytes, {os.fstat(file.fileno()).st_mtime_ns}, {ends}"


def _code() -> str:
    """Of all sources that compute, and of the compiled library's file."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    compiled = library.compiled_file()
    if compiled is not None:
        digest.update(compiled.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    root = Path(aphroquant.__file__).parent
    yield from sorted(root.glob("*.py"))
    for package in _PACKAGES:
        yield from sorted((root / package).resolve().rglob("*.py"))


def _device(device: torch.device) -> str:
    """What the last bits of a product depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
