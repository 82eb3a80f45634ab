"""Layers quantized with every width that they may get, kept in a temporary file until the choice is made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.solvers import SOLVERS, rounding_for
from aphroquant.calibration.statistics import InputStatistics
from aphroquant.conversion.allocation.problem import Width
from aphroquant.conversion.gguf_plan import GgufPlan
from aphroquant.errors import ResourceError
from aphroquant.formats.gguf import block_type, quantize
from aphroquant.schemes import QuantizedWeight, Scheme

CPU = torch.device("cpu")


def pieces_of(
    width: Width, weights: Mapping[str, Tensor], statistics: InputStatistics, *, quick: bool
) -> dict[str, QuantizedWeight]:
    """Weights that share an input with one width, as the conversion would round them without scaling channels; to
    nearest, if `quick`."""
    plan = width.plan
    if isinstance(plan, GgufPlan):
        importance = statistics.mean_square.cpu()
        return {
            module: quantize(block_type(plan.types[module]), weight.cpu(), importance, name=module)
            for module, weight in weights.items()
        }
    alike: dict[tuple[Scheme, str, bool], list[str]] = {}
    for module in weights:
        solver = SOLVERS["rtn"] if quick else plan.solvers[module]
        alike.setdefault((plan.schemes[module], solver.name, plan.calibrates_module(module)), []).append(module)
    found: dict[str, QuantizedWeight] = {}
    for (scheme, name, looks), modules in alike.items():
        rounding = rounding_for(scheme, SOLVERS[name])
        own = [weights[module] for module in modules]
        solutions = rounding(own, statistics if looks else None, scheme, plan.scale_dtype)
        found |= {module: solved.weight.to(CPU) for module, solved in zip(modules, solutions, strict=True)}
    return found


class _Place(NamedTuple):
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class PieceStore:
    """Quantized weights in a file without a name: it is gone with the process, however that ends."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="aphroquant-pieces-")
        Path(name).unlink()
        self._folder = Path(name).parent
        self._file = os.fdopen(descriptor, "r+b")
        self._end = 0
        self._held: dict[tuple[str, int], tuple[Scheme, dict[str, _Place], tuple[int, int]]] = {}

    def close(self) -> None:
        self._file.close()

    def put(self, module: str, width: int, weight: QuantizedWeight) -> None:
        places = {name: self._write(tensor) for name, tensor in weight.tensors.items()}
        self._held[module, width] = weight.scheme, places, weight.shape

    def get(self, module: str, width: int) -> QuantizedWeight:
        scheme, places, shape = self._held[module, width]
        return QuantizedWeight(scheme, {name: self._read(place) for name, place in places.items()}, shape)

    def values(self, chosen: Mapping[str, int]) -> dict[str, Tensor]:
        """Dense weights of some modules, with a width for each."""
        return {module: self.get(module, width).dequantize() for module, width in chosen.items()}

    def _write(self, tensor: Tensor) -> _Place:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        place = _Place(self._end, tensor.dtype, tuple(tensor.shape))
        try:
            self._file.seek(self._end)
            self._file.write(content.data)
        except OSError as error:
            raise ResourceError(
                f"{self._folder}: no room for the layers in every width: {error.strerror or error}",
                hint="a TMPDIR on a larger disk",
            ) from error
        self._end += content.nbytes
        return place

    def _read(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self._file.seek(place.offset)
        self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor
