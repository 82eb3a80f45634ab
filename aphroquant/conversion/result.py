"""What a conversion made, or, of a dry run, would make."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConversionResult:
    """Sizes are of tensor data; `bits_per_weight` is that of the quantized modules with scales and zero points.

    `mode` is "quantize" of a dense source, "repack" if a quantized source's own numbers were kept bit for bit, or
    "requantize" if they were not; `outcome` says it in a sentence, with the reason. `modules` maps each quantized
    module to what its solver reported; `scaling` and `refinement` say it of blocks, `distillation` of the model,
    `allocation` how the bits of layers were chosen.
    Errors are squared and relative: `mean_relative_error` of the layers' outputs,
    `weight_relative_error` of the weights. `seconds` and `peak_memory_bytes` are measured (0 in a dry run).
    """

    source: str
    out: str
    to: str
    mode: str
    outcome: str
    scheme: str
    solver: str | None
    num_modules: int
    num_bytes: int
    source_bytes: int
    bits_per_weight: float
    mean_relative_error: float | None = None
    weight_relative_error: float | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    scaling: dict[str, dict[str, Any]] = field(default_factory=dict)
    refinement: dict[str, dict[str, Any]] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return asdict(self)
