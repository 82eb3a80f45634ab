"""How a layer's input is quantized: what its scheme says, and what the fast mode adds."""

from __future__ import annotations

from typing import NamedTuple

from aphroquant.kernels.cpu.abi import (
    INPUT_FP8_GROUP,
    INPUT_FP8_ROW,
    INPUT_FP8_STATIC,
    INPUT_INT_CHUNK,
    INPUT_INT_GROUP,
    INPUT_INT_ROW,
    INPUT_INT_STATIC,
    INPUT_NONE,
    LinearStruct,
)
from aphroquant.kernels.cpu.grouped import GroupedWeight
from aphroquant.kernels.cpu.packing import MAX_CHUNK, MAX_ROW_CHUNK
from aphroquant.kernels.reference.linear import input_scheme
from aphroquant.schemes import (
    ActivationScheme,
    IntegerScheme,
    QuantizedWeight,
    Scheme,
)


class InputSettings(NamedTuple):
    """The fields of LinearStruct that describe the input."""

    kind: int
    integer_dot: bool = False
    levels: int = 127
    group: int = 0
    scale: float = 0.0

    @property
    def max_chunk(self) -> int:
        """Columns that may share one integer dot product."""
        return MAX_ROW_CHUNK if self.kind in (INPUT_INT_ROW, INPUT_INT_STATIC) else MAX_CHUNK

    def fill(self, struct: LinearStruct) -> None:
        struct.input_kind, struct.integer_dot = self.kind, int(self.integer_dot)
        struct.input_levels, struct.input_group, struct.input_scale = self.levels, self.group, self.scale


def unsupported(scheme: Scheme) -> str | None:
    """Why the compiled kernels cannot compute a layer of this scheme, or None."""
    activations = input_scheme(scheme)
    if activations is None:
        return None
    if activations.kind == "float" and activations.bits != 8:
        return f"{scheme}: {activations.bits}-bit float inputs"
    if activations.kind == "int" and not 2 <= activations.bits <= 8:
        return f"{scheme}: {activations.bits}-bit integer inputs"
    return None


def input_settings(weight: QuantizedWeight, codes: GroupedWeight, activations: str) -> InputSettings:
    """Settings for one layer. `activations` ("int8" or "float") is about layers whose scheme leaves inputs alone."""
    inputs = input_scheme(weight.scheme)
    if inputs is not None:
        return _from_scheme(weight, inputs)
    if activations == "int8" and codes.kind == "codes" and codes.table is None:
        return InputSettings(INPUT_INT_CHUNK, integer_dot=True)
    return InputSettings(INPUT_NONE)


def _from_scheme(weight: QuantizedWeight, inputs: ActivationScheme) -> InputSettings:
    group = inputs.group_size or 0
    scale = 0.0 if inputs.dynamic else float(weight["input_scale"])
    levels = 2 ** (inputs.bits - 1) - 1 if inputs.kind == "int" else 0
    if inputs.kind == "float":
        kind = INPUT_FP8_GROUP if group else INPUT_FP8_ROW if inputs.dynamic else INPUT_FP8_STATIC
    else:
        kind = INPUT_INT_GROUP if group else INPUT_INT_ROW if inputs.dynamic else INPUT_INT_STATIC
    integer_dot = isinstance(weight.scheme, IntegerScheme) and kind in (INPUT_INT_ROW, INPUT_INT_STATIC)
    return InputSettings(kind, integer_dot, levels, group, scale)
