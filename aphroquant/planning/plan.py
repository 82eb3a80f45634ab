"""plan(): everything that can be said of a conversion before it is begun."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.checkpoint.shard import HEADER_ROOM, SMALL_BYTES
from aphroquant.checkpoint.writer import DEFAULT_SHARD_BYTES
from aphroquant.compatibility import Support, support
from aphroquant.conversion.conversion import Conversion
from aphroquant.conversion.fused import unequal_groups
from aphroquant.conversion.gguf_plan import GgufPlan
from aphroquant.conversion.gguf_run import GgufConversion
from aphroquant.conversion.loss import LossError, refuse_loss
from aphroquant.conversion.progress import Progress
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.run import opened_source, planned_conversion
from aphroquant.conversion.targets import can_be_quantized_for
from aphroquant.conversion.together import check_together
from aphroquant.errors import AphroquantError, UsageError
from aphroquant.planning.estimate import Estimate, estimate
from aphroquant.planning.gpus import Gpu
from aphroquant.planning.serving import Capacity, capacity, undivided
from aphroquant.provenance.card import schemes_in
from aphroquant.schemes import Scheme

_HEADER_BYTES = 96  # of a tensor in a safetensors header, its name included, about
_RECORD_BYTES = 700  # of a quantized layer in aphroquant.json, about


@dataclass(frozen=True)
class OutputPlan:
    """One output. `num_bytes` are of tensors, `file_bytes` of all files; `engines` maps those that load it to what they
    need or how that is known; `undivided` says what tensor parallelism does not divide, `fused` what engines refuse."""

    name: str
    place: str
    to: str
    scheme: str
    outcome: str
    calibrates: bool
    num_modules: int
    bits_per_weight: float
    num_bytes: int
    file_bytes: int
    source_bytes: int
    engines: dict[str, str]
    undivided: tuple[str, ...]
    fused: str | None
    capacities: tuple[Capacity, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All outputs and the work that makes them. `estimate` is None if nothing was tried, with `no_estimate` saying why;
    `disk_bytes` is what the outputs need."""

    source: str
    outputs: tuple[OutputPlan, ...]
    disk_bytes: int
    tensor_parallel: int
    estimate: Estimate | None
    no_estimate: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def plan(
    requests: Sequence[ConversionRequest],
    *,
    gpus: Sequence[Gpu] = (),
    tensor_parallel: int = 1,
    tries: bool = True,
    work: Path | None = None,
) -> Plan:
    """Check the requests, which have one source, against it, and say what comes of them.

    `tries` has the first blocks converted, for time and memory. Errors are those of the conversion.
    """
    if tensor_parallel < 1:
        raise UsageError(f"tensor_parallel = {tensor_parallel} must be at least 1")
    checkpoint = opened_source(requests)
    conversions = [_planned(request, checkpoint) for request in requests]
    check_together(conversions)
    outputs = tuple(_output(each, checkpoint, gpus, tensor_parallel) for each in conversions)
    found, reason = None, "nothing was tried"
    if tries:
        calibrates = any(conversion.calibrates for conversion in conversions)
        try:
            source = open_checkpoint(requests[0].source)  # which `checkpoint` may show rotated
            found, reason = estimate(source, requests, calibrates=calibrates, work=work), ""
        except AphroquantError as error:
            reason = error.message
    disk = sum(output.file_bytes for output in outputs)
    return Plan(requests[0].source, outputs, disk, tensor_parallel, found, reason)


def _planned(request: ConversionRequest, checkpoint: Checkpoint) -> Conversion:
    try:
        return planned_conversion(request, checkpoint, Progress(), None, measures=False)
    except LossError as error:
        if not request.requantize or not can_be_quantized_for(request.to):
            raise refuse_loss(checkpoint, request, error.message) from error
        return planned_conversion(request, checkpoint, Progress(), error.message, measures=False)


def _output(conversion: Conversion, checkpoint: Checkpoint, gpus: Sequence[Gpu], ranks: int) -> OutputPlan:
    result, made = conversion.preview(), conversion.plan
    schemes: Mapping[str, Scheme] = {} if isinstance(made, GgufPlan) else made.schemes
    spec = checkpoint.spec
    found = support(result.to, schemes_in(result.scheme))
    return OutputPlan(
        name=Path(result.out).name,
        place=result.out,
        to=result.to,
        scheme=result.scheme,
        outcome=result.outcome,
        calibrates=conversion.calibrates,
        num_modules=result.num_modules,
        bits_per_weight=result.bits_per_weight,
        num_bytes=result.num_bytes,
        file_bytes=_file_bytes(conversion, checkpoint, result),
        source_bytes=result.source_bytes,
        engines={entry.engine: _known(entry) for entry in found},
        undivided=tuple(undivided(spec, made.modules, schemes, ranks) if schemes else ()),
        fused=unequal_groups(spec, schemes) if schemes else None,
        capacities=tuple(capacity(spec, result.num_bytes, gpu, ranks) for gpu in gpus),
        notes=result.notes,
        warnings=result.warnings,
    )


def _known(entry: Support) -> str:
    needs = f"needs {entry.needs}" if entry.needs else ""
    return "; ".join(filter(None, (needs, "by its documentation" if entry.is_documented else "")))


def _file_bytes(conversion: Conversion, checkpoint: Checkpoint, result: ConversionResult) -> int:
    """Of tensors, headers, records and what is carried over."""
    records = result.num_modules * _RECORD_BYTES
    if isinstance(conversion, GgufConversion):
        return conversion.file_bytes + records
    headers = (len(checkpoint.tensors) + 2 * result.num_modules) * _HEADER_BYTES
    if result.num_bytes >= SMALL_BYTES:  # beyond that, room is left for them
        headers = HEADER_ROOM * math.ceil(result.num_bytes / DEFAULT_SHARD_BYTES)
    carried = sum(path.stat().st_size for path in checkpoint.carried_files())
    return result.num_bytes + headers + carried + records
