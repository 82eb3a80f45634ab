"""What a user asks a conversion for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aphroquant.calibration.data import check_mixing
from aphroquant.calibration.effort import DEFAULT_EFFORT, find_effort
from aphroquant.conversion.rules import ModuleRule
from aphroquant.devices import torch_device
from aphroquant.errors import UsageError

PER_ROW = -1  # as a group size: one group for the whole row


@dataclass(frozen=True)
class ConversionRequest:
    """The arguments of a conversion. None stands for "the best for this target and model".

    `group_size` -1 means one group a row. `samples` 0 means no calibration. `ignore` are names of modules that stay
    dense: whole names, or patterns with * and ?, matched from any dot on ("o_proj", "model.layers.0.*").
    `device` calibrates and solves: "auto" (a GPU if there is one), "cpu" or "cuda".
    `bits` with a point (3.5) is an average, scales and zero points included, and `size` the bytes of all tensors: both
    let the bits of each layer be chosen.
    `calibration` are text and JSONL files, "default" the bundled ones; `weights` their shares of the windows (none: one
    stream of all), `packing` says where windows may begin, `chat_template` is a file in place of the model's template.
    `rules` give some modules something else than all others; `ignore` has the last word.
    `requantize` allows what is quantized already to be changed, with a loss.
    `effort` ("fast", "normal" or "best") decides what `solver`, `refine_steps` and `distill_steps` leave open.
    `kv_scales` finds scales for an FP8 cache of keys and values, and stores them beside the weights.
    `rotate` writes the model in other channels, by a rotation drawn with `seed`, before anything else.
    """

    source: str
    to: str
    out: Path
    scheme: str | None = None
    bits: int | float | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    solver: str | None = None
    calibration: tuple[Path, ...] = ()
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    ignore: tuple[str, ...] = ()
    overwrite: bool = False
    device: str = "auto"
    requantize: bool = False
    effort: str = DEFAULT_EFFORT
    refine_steps: int | None = None
    distill_steps: int | None = None
    rules: tuple[ModuleRule, ...] = ()
    rotate: bool = False
    kv_scales: bool = False
    size: int | None = None
    weights: tuple[float, ...] = ()
    packing: str = "stream"
    chat_template: Path | None = None

    def __post_init__(self) -> None:
        if self.whole_bits is not None and not 1 <= self.whole_bits <= 8:
            raise UsageError(f"bits = {self.bits} must be between 1 and 8")
        if self.group_size is not None and self.group_size < 1 and self.group_size != PER_ROW:
            raise UsageError(f"group_size = {self.group_size} must be positive, or -1 for one group a row")
        self._check_allocation()
        if self.samples < 0:
            raise UsageError(f"samples = {self.samples} must not be negative")
        if self.seq_len < 2:
            raise UsageError(f"seq_len = {self.seq_len} must be at least 2")
        for name, steps in (("refine_steps", self.refine_steps), ("distill_steps", self.distill_steps)):
            if steps is not None and steps < 0:
                raise UsageError(f"{name} = {steps} must not be negative")
        check_mixing(len(self.calibration), self.weights, self.packing)
        find_effort(self.effort)
        torch_device(self.device)  # found before the work
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed = {self.seed} must be between 0 and 2**63 - 1")

    @property
    def whole_bits(self) -> int | None:
        """The same for all layers."""
        return self.bits if isinstance(self.bits, int) else None

    @property
    def average_bits(self) -> float | None:
        """To be met by layers of different bits."""
        return self.bits if isinstance(self.bits, float) else None

    @property
    def is_allocated(self) -> bool:
        """Whether the bits of layers are to be chosen."""
        return self.average_bits is not None or self.size is not None

    def _check_allocation(self) -> None:
        if not self.is_allocated:
            return
        given = {
            "--size": self.average_bits is not None and self.size is not None,
            f"--bits {self.bits}": self.whole_bits is not None,
            f"--scheme {self.scheme}": self.scheme is not None,
        }
        if option := next((option for option, contradicts in given.items() if contradicts), None):
            asked = f"--size {self.size}" if self.average_bits is None else f"--bits {self.average_bits:g}"
            raise UsageError(f"{asked} chooses the bits of each layer, so that {option} does not go with it")
        if self.average_bits is not None and not 1 <= self.average_bits <= 32:
            raise UsageError(f"bits = {self.average_bits} on average must be between 1 and 32")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size = {self.size} must be positive")
