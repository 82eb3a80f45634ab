"""Inputs that are quantized at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aphroquant.errors import UsageError


@dataclass(frozen=True)
class ActivationScheme:
    """How the input of a linear layer is quantized at run time.

    `granularity` "tensor" needs a static `input_scale` unless `dynamic`; "token" is one scale a row; "group" is
    one scale for `group_size` consecutive columns of a row. Always symmetric.
    """

    kind: Literal["int", "float"]
    bits: int = 8
    dynamic: bool = True
    granularity: Literal["tensor", "token", "group"] = "token"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group_size is not None):
            raise UsageError(f"activation granularity {self.granularity!r} and group_size {self.group_size} contradict")
