"""HQQ: integer codes with real zero points, in groups of the flattened weight.

    P.W_q            the codes as a matrix [N*K/G, G] (axis 1) or [G, N*K/G] (axis 0), packed; see `packing`
    P.scale, P.zero  float [N*K/G, 1] (axis 1) or [1, N*K/G] (axis 0)
    P.shape          int64 [2] = (N, K)
    P.nbits, P.group_size, P.axis, P.packing, ...: see `settings`

W = (code - zero) * scale. `quantization_config` has the settings for all modules, or for each tag: the module's name
without numbers, "model" and "layers".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.hqq import settings
from aphroquant.formats.hqq.packing import BITS, pack, packing_of, unpack
from aphroquant.schemes import AffineScheme, IntegerScheme, QuantizedWeight, Scheme


@dataclass(frozen=True)
class Hqq(Format):
    """HQQ checkpoints. `layouts` maps tags to schemes; the tag "" stands for all modules."""

    name: ClassVar[str] = "hqq"
    quant_method: ClassVar[str] = "hqq"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"W_q", "scale", "zero", "shape", *settings.NAMES})

    layouts: Mapping[str, AffineScheme]
    skip_modules: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        found = reading.read_mapping(config, "quant_config")
        by_tag = {"": found} if settings.PARAMETERS in found else found
        layouts = {}
        for tag, entry in by_tag.items():
            if entry is None:
                continue  # a tag that stays dense
            where = f"quant_config.{tag}" if tag else "quant_config"
            if not isinstance(entry, Mapping):
                raise InputError(f"quantization_config: {where} = {entry!r} must be an object")
            layouts[tag] = settings.scheme_of(reading.read_mapping(entry, settings.PARAMETERS), where)
        return cls(layouts, reading.read_names(config, "skip_modules"))

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        layouts: dict[str, AffineScheme] = {}
        first: dict[str, str] = {}
        for module, scheme in writing.quantized(schemes).items():
            held, tag = _held(module, scheme), tag_of(module)
            first.setdefault(tag, module)
            if layouts.setdefault(tag, held) != held:
                raise UsageError(f"hqq has one scheme for every {tag}, but {first[tag]} has another one than {module}")
        skipped = dict.fromkeys(tag_of(module) for module in writing.left_dense_with_head(schemes, dense_modules))
        for tag in skipped:
            if tag in layouts:
                raise UsageError(f"hqq cannot quantize {first[tag]} and leave another {tag} dense: it skips by name")
        if len(set(layouts.values())) == 1:
            layouts = {"": next(iter(layouts.values()))}
        return cls(layouts, tuple(skipped))

    def quantization_config(self) -> dict[str, Any]:
        by_tag = {tag: settings.to_config(scheme) for tag, scheme in self.layouts.items()}
        return {
            "quant_method": "hqq",
            "quant_config": by_tag.get("", by_tag),
            "skip_modules": list(self.skip_modules),
        }

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "W_q" not in headers:
            return None
        scheme = self.scheme_of(module)
        if scheme is None or tag_of(module) in self.skip_modules:
            raise InputError(f"{module} has a W_q, although quantization_config leaves it dense")
        found = reading.require_matrix(module, headers, "scale", reading.SCALE_DTYPES)
        if found[1 - scheme.axis] != found[0] * found[1]:
            raise InputError(f"{module}.scale has shape {list(found)}, which is not that of groups along {scheme.axis}")
        reading.require_shape(module, headers, "zero", reading.SCALE_DTYPES, found)
        reading.require_shape(module, headers, "shape", (torch.int64, torch.int32), (2,))
        self._require_codes(module, scheme, headers, groups=found[0] * found[1])
        return scheme

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        assert isinstance(scheme, AffineScheme)
        packing = packing_of(scheme.bits)
        stored = tensors["W_q"].contiguous().view(packing.dtype)  # the library can store bytes as floats
        shape, rows = _shape(module, scheme, stored, packing.fields, tensors["shape"])
        settings.check_tensors(module, scheme, (rows, stored.shape[1])[scheme.axis], tensors)
        codes = unpack(stored, packing, rows).reshape(shape)
        if int(codes.max()) >= 2**scheme.bits:
            raise InputError(f"{module}.W_q has the code {int(codes.max())}, the limit is {2**scheme.bits - 1}")
        canonical = {"codes": codes, "scales": tensors["scale"].flatten(), "zeros": tensors["zero"].flatten()}
        weight = QuantizedWeight(scheme, canonical, shape)
        weight.check(module)  # N and K were not known before
        return weight

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        held = _held(module, weight.scheme)
        if held != self.scheme_of(module):
            raise UsageError(f"{module}: a weight of scheme {weight.scheme} was not announced for this module")
        writing.checked(module, weight, weight.scheme)
        if isinstance(weight.scheme, IntegerScheme):  # its last group may be shorter
            writing.require_multiple("hqq", module, "in_features", weight.shape[1], held.group_size or 1)
        groups, packing = held.num_groups(*weight.shape), packing_of(held.bits)
        codes = weight["codes"].reshape((groups, -1) if held.axis == 1 else (-1, groups))
        if packing.dtype == torch.uint8:  # words of ten codes are filled up
            writing.require_multiple("hqq", module, "rows of codes", codes.shape[0], packing.fields)
        per_group = (groups, 1) if held.axis == 1 else (1, groups)
        return {
            "W_q": pack(codes, packing),
            "scale": weight["scales"].reshape(per_group).contiguous(),
            "zero": _real_zeros(weight).reshape(per_group).contiguous(),
            "shape": torch.tensor(weight.shape, dtype=torch.int64),
        } | settings.to_tensors(held, codes.shape[held.axis], weight["scales"].dtype)

    def scheme_of(self, module: str) -> AffineScheme | None:
        """The scheme that `quantization_config` has for a module."""
        return self.layouts.get(tag_of(module), self.layouts.get(""))

    def _require_codes(
        self, module: str, scheme: AffineScheme, headers: Mapping[str, TensorHeader], groups: int
    ) -> None:
        """Check W_q against the groups, as far as headers tell: N and K stand in a tensor."""
        packing = packing_of(scheme.bits)
        packed_rows, columns = reading.require_matrix(module, headers, "W_q", (packing.dtype, *reading.SCALE_DTYPES))
        columns = columns * headers["W_q"].dtype.itemsize // packing.dtype.itemsize
        rows, expected_columns = (groups, scheme.group_size) if scheme.axis == 1 else (scheme.group_size, groups)
        if (rows is not None and -(-rows // packing.fields) != packed_rows) or (expected_columns or columns) != columns:
            raise InputError(
                f"{module}.W_q has shape {[packed_rows, columns]}, which does not hold {groups} groups of "
                f"{scheme.group_size or 'any number of'} {scheme.bits}-bit codes along {scheme.axis}"
            )


def tag_of(module: str) -> str:
    """The name by which the library knows all modules of a kind: "self_attn.q_proj"."""
    return ".".join(part for part in module.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _held(module: str, scheme: Scheme) -> AffineScheme:
    """The scheme as HQQ holds it: integer zero points become real ones, without a change."""
    if isinstance(scheme, AffineScheme):
        held = scheme
    elif isinstance(scheme, IntegerScheme) and not (scheme.has_offsets or scheme.act_order or scheme.activations):
        held = AffineScheme(scheme.bits, scheme.group_size)
    else:
        kind = "real-valued offsets" if isinstance(scheme, IntegerScheme) and scheme.has_offsets else str(scheme)
        raise UsageError(f"{module}: hqq holds integers with zero points, not {kind}", hint=writing.REQUANTIZE)
    if held.bits not in BITS:
        widths = ", ".join(str(width) for width in BITS)
        raise UsageError(f"{module}: hqq holds {widths} bits, not {held.bits}", hint=writing.REQUANTIZE)
    return held


def _real_zeros(weight: QuantizedWeight) -> Tensor:
    """Zero points in the dtype of the scales; every integer one is exact in it."""
    if not isinstance(weight.scheme, IntegerScheme):
        return weight["zeros"]
    if weight.scheme.symmetric:
        return torch.full_like(weight["scales"], 2 ** (weight.scheme.bits - 1))
    return weight["zeros"].to(weight["scales"].dtype)


def _shape(
    module: str, scheme: AffineScheme, packed: Tensor, fields: int, stored: Tensor
) -> tuple[tuple[int, int], int]:
    """((N, K), rows of the matrix of codes), checked against W_q."""
    out_features, in_features = (int(size) for size in stored)
    packed_rows, columns = packed.shape
    rows = out_features * in_features // columns
    whole = (out_features, in_features)[scheme.axis]  # a group without a group size
    fits = min(out_features, in_features) > 0 and rows * columns == out_features * in_features
    if (
        not fits
        or -(-rows // fields) != packed_rows
        or (scheme.group_size is None and (rows, columns)[scheme.axis] != whole)
    ):
        raise InputError(
            f"{module}.shape is {[out_features, in_features]}, but W_q has {packed_rows} x {columns} numbers of "
            f"{fields} codes"
        )
    return (out_features, in_features), rows
