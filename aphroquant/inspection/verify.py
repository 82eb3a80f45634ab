"""verify(): recompute everything about a checkpoint that can be checked without another one.

One matrix, or a piece of one, is in memory at a time. What cannot be read at all is an InputError, as everywhere; what
can be read and is wrong becomes a Finding.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import suffix
from aphroquant.checkpoint.expected import expected_modules
from aphroquant.checkpoint.inspection import role
from aphroquant.errors import InputError
from aphroquant.inspection.findings import SEVERITIES, Finding, by_severity
from aphroquant.inspection.labels import label_findings
from aphroquant.inspection.numbers import number_findings
from aphroquant.inspection.profile import Profile, profile
from aphroquant.inspection.settings import fitting_settings
from aphroquant.inspection.structure import manifest_findings, structure_findings
from aphroquant.inspection.vectors import kv_findings, tensor_findings, tied_head_findings
from aphroquant.models.spec import EMBEDDING
from aphroquant.schemes import DenseScheme, LookupScheme, Scheme

OnProgress = Callable[[int, int], None]  # bytes checked, bytes in all

_OUTLYING = 50.0  # times the median of the same layer in other blocks
_ENOUGH_LAYERS = 5


@dataclass(frozen=True)
class Verification:
    """All findings, the worst first, and how much was looked at."""

    source: str
    path: str
    format: str
    num_modules: int
    num_tensors: int
    num_bytes: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return self.count("error") == 0

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "passed": self.passed,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
        }


def verify(checkpoint: Checkpoint, on_progress: OnProgress | None = None) -> Verification:
    """Check every tensor of an opened checkpoint. InputError only for files that cannot be read."""
    findings: list[Finding] = []
    schemes = _schemes(checkpoint, findings)
    findings += structure_findings(checkpoint, schemes) if schemes else []
    findings += manifest_findings(checkpoint)
    progress = _Progress(checkpoint, on_progress or (lambda done, total: None))
    profiles = _check_modules(checkpoint, schemes, findings, progress)
    findings += label_findings(list(profiles.values()), _labelled_format(checkpoint))
    findings += _duplicate_findings(checkpoint, profiles)
    findings += _outlier_findings(checkpoint, profiles)
    findings += _global_scale_findings(checkpoint, profiles)
    for name in _other_tensors(checkpoint, schemes):
        findings += tensor_findings(checkpoint, name)
        progress.add(checkpoint.tensors[name].nbytes)
    findings += kv_findings(checkpoint)
    findings += _tied(checkpoint, schemes)
    return Verification(
        source=checkpoint.source,
        path=str(checkpoint.path),
        format=checkpoint.format_name,
        num_modules=len(profiles),
        num_tensors=len(checkpoint.tensors),
        num_bytes=checkpoint.num_bytes,
        findings=tuple(by_severity(findings)),
    )


class _Progress:
    def __init__(self, checkpoint: Checkpoint, told: OnProgress) -> None:
        self._done, self._total, self._told = 0, checkpoint.num_bytes, told

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._told(self._done, self._total)


def _schemes(checkpoint: Checkpoint, findings: list[Finding]) -> Mapping[str, Scheme]:
    """The schemes; none, and a finding, where config and shapes contradict each other."""
    try:
        return checkpoint.schemes()
    except InputError as error:
        message = error.message.removeprefix(f"{checkpoint.path}: ")
        advice = fitting_settings(checkpoint) or error.hint or ""
        findings.append(
            Finding("error", "config-against-shapes", "quantization_config", message, advice, "config.json")
        )
        return {}


def _check_modules(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], findings: list[Finding], progress: _Progress
) -> dict[str, Profile]:
    files = _files(checkpoint)
    sizes = checkpoint.module_bytes() if schemes else {}
    shapes = _wanted_shapes(checkpoint)
    profiles = {}
    for module, scheme in schemes.items():
        file = files.get(module, "")
        try:
            found = profile(module, scheme, checkpoint.weight_pieces(module))
        except InputError as error:
            message = error.message.removeprefix(f"{checkpoint.path}: ").removeprefix(module).lstrip(":. ")
            findings.append(Finding("error", "unreadable", module, message, error.hint or "", file))
        else:
            profiles[module] = found
            is_gguf, is_embedding = checkpoint.format_name == "gguf", module == EMBEDDING
            findings += number_findings(found, file, is_gguf=is_gguf, is_embedding=is_embedding)
            if not isinstance(scheme, DenseScheme) and shapes.get(module, found.shape) != found.shape:
                message = f"holds a weight {list(found.shape)}, and the config wants {list(shapes[module])}"
                advice = fitting_settings(checkpoint) or "config.json and the weights are of different models"
                findings.append(Finding("error", "wrong-shape", module, message, advice, file))
        progress.add(sizes[module])
    return profiles


def _duplicate_findings(checkpoint: Checkpoint, profiles: Mapping[str, Profile]) -> Iterator[Finding]:
    """Layers of the same role with the same numbers."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for module, found in profiles.items():
        if not found.is_zero and found.count > 1 and role(module) != module:
            groups[role(module), found.fingerprint].append(module)
    files = _files(checkpoint)
    for modules in groups.values():
        for module in modules[1:]:
            message = f"is the same as {modules[0]}"
            advice = "right after layers were stacked on purpose; else a layer was written twice"
            yield Finding("warning", "duplicated", module, message, advice, files.get(module, ""))


def _outlier_findings(checkpoint: Checkpoint, profiles: Mapping[str, Profile]) -> Iterator[Finding]:
    """Layers whose weights are of quite another size than the same layer's in other blocks."""
    groups: dict[str, list[Profile]] = defaultdict(list)
    for module, found in profiles.items():
        if not found.is_zero and not found.not_finite and found.rms > 0:
            groups[role(module)].append(found)
    files = _files(checkpoint)
    for members in groups.values():
        if len(members) < _ENOUGH_LAYERS:
            continue
        median = statistics.median(found.rms for found in members)
        for found in members:
            if not median / _OUTLYING < found.rms < median * _OUTLYING:
                message = f"its weights are {found.rms / median:.3g} times as large as those of this layer elsewhere"
                advice = "damaged, or scales of another layer: compare with the original"
                yield Finding("warning", "outlying-size", found.module, message, advice, files.get(found.module, ""))


def _global_scale_findings(checkpoint: Checkpoint, profiles: Mapping[str, Profile]) -> Iterator[Finding]:
    """NVFP4 layers that engines fuse into one need one global scale."""
    from aphroquant.inspection.structure import FUSED

    for module, found in profiles.items():
        for linears in FUSED:
            prefix = module.removesuffix(linears[0])
            if module == prefix or not isinstance(found.scheme, LookupScheme) or found.scheme.scales != "e4m3":
                continue
            scales = {
                profiles[prefix + linear].scales["global_scale"].largest
                for linear in linears
                if prefix + linear in profiles and "global_scale" in profiles[prefix + linear].scales
            }
            if len(scales) > 1:
                names = ", ".join(linear.rpartition(".")[2] for linear in linears)
                message = f"{names} have different global scales"
                advice = "engines that fuse them take the largest, which costs a little accuracy"
                yield Finding("info", "global-scales-differ", module, message, advice, "")


def _other_tensors(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> list[str]:
    """What is stored and part of no matrix. Without schemes, everything that can be checked as it is."""
    if not schemes:
        return list(checkpoint.tensors)
    dense = checkpoint.dense_names()
    return [name for name in dense if not (name.endswith(".weight") and name.removesuffix(".weight") in schemes)]


def _tied(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> Sequence[Finding]:
    try:
        return list(tied_head_findings(checkpoint, schemes, checkpoint.spec))
    except InputError:
        return []  # an unknown model, or a head that is unreadable: told before


def _wanted_shapes(checkpoint: Checkpoint) -> Mapping[str, tuple[int, int]]:
    try:
        return expected_modules(checkpoint.spec)
    except InputError:
        return {}


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    """The file of each module."""
    return {name.removesuffix(f".{suffix(name)}"): info.file.name for name, info in checkpoint.tensors.items()}


def _labelled_format(checkpoint: Checkpoint) -> str:
    """The format's name, and for GPTQ whether its zero points are stored less one."""
    label = getattr(checkpoint.format, "checkpoint_format", None)
    return "gptq-v1" if checkpoint.format_name == "gptq" and label == "gptq" else checkpoint.format_name
