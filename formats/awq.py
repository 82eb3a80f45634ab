"""AWQ, version "gemm": 4-bit integers, groups along the input, interleaved nibbles packed along the output.

    P.qweight int32 [K, N/8]    P.qzeros int32 [K/G, N/8]    P.scales float16 [K/G, N]

Read as well: the versions "gemv" and "gemv_fast" (see `awq_gemv`), and the older config files with other keys.
The head stays dense: AutoAWQ looks for quantized layers in the blocks only, transformers always skips the head, and
GPTQModel and vLLM read a quantized one each in its own way. One that a file has is read.
Zero points are stored as they are. What AWQ folds into the preceding norm or linear layer is folded in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError
from aphroquant.formats import awq_gemv, reading, writing
from aphroquant.formats.base import Format, TensorHeader
from aphroquant.formats.packing import AWQ_PACK, pack_awq, unpack_awq
from aphroquant.schemes import IntegerScheme, QuantizedWeight, Scheme

BITS = 4
SYMMETRIC_ZERO = 8
READABLE = ("gemm", awq_gemv.GEMV, awq_gemv.GEMV_FAST)


@dataclass(frozen=True)
class Awq(Format):
    """AWQ checkpoints. A symmetric scheme is written with zero points of 8, which every reader understands.

    `"zero_point": true` is written even then, since readers take it as "qzeros are there"; the additional key `"sym"`
    lets this reader (and GPTQModel's) know.
    """

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"
    tensor_names: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    left_dense: ClassVar[frozenset[str]] = frozenset({writing.LM_HEAD})

    group_size: int | None
    symmetric: bool
    modules_to_not_convert: tuple[str, ...] = ()
    version: str = "gemm"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        version = reading.read_text(config, "version", "format", "checkpoint_format", default="gemm")
        if version not in READABLE:
            raise InputError(f"quantization_config: AWQ version {version!r} is not readable; {', '.join(READABLE)} are")
        bits = reading.read_integer(config, "bits", "w_bit")
        if bits != BITS:
            raise InputError(f"quantization_config: AWQ has 4 bits, not {bits}")
        return cls(
            group_size=reading.read_group_size(config, "group_size", "q_group_size"),
            symmetric=reading.read_flag(config, "sym", default=False)
            or not reading.read_flag(config, "zero_point", default=True),
            modules_to_not_convert=reading.read_names(config, "modules_to_not_convert"),
            version=version,
        )

    @classmethod
    def for_schemes(cls, schemes: Mapping[str, Scheme], dense_modules: list[str]) -> Self:
        held = {
            module: writing.weight_only_integer("awq", module, scheme, (BITS,))
            for module, scheme in writing.quantized(schemes).items()
        }
        for module, scheme in held.items():
            if module in cls.left_dense:
                raise UsageError(f"{module}: awq's readers take it for dense, so that it cannot be {scheme}")
            if scheme.act_order:
                raise UsageError(
                    f"{module}: awq has no activation order (group index), which {scheme} needs",
                    hint="write gptq, which has; or " + writing.REQUANTIZE,
                )
        writing.same_for_all("awq", "group size", {module: scheme.group_size for module, scheme in held.items()})
        dense = writing.left_dense(schemes, dense_modules)
        _refuse_ambiguous_skips(list(held), dense)
        return cls(
            group_size=next(iter(held.values())).group_size if held else 128,
            symmetric=bool(held) and all(scheme.symmetric for scheme in held.values()),
            modules_to_not_convert=tuple(dense),
        )

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": -1 if self.group_size is None else self.group_size,
            "zero_point": True,
            "sym": self.symmetric,
            "version": "gemm",
            "modules_to_not_convert": list(self.modules_to_not_convert) or None,
        }

    def scheme(self, module: str, headers: Mapping[str, TensorHeader]) -> Scheme | None:
        if "qweight" not in headers:
            return None
        if self.version != "gemm":
            return awq_gemv.scheme(module, headers, self.version, self.group_size, symmetric=self.symmetric)
        in_features, words = reading.require_matrix(module, headers, "qweight", (torch.int32,))
        if in_features % (self.group_size or in_features):
            raise InputError(f"{module}: group_size = {self.group_size} does not divide in_features = {in_features}")
        groups = in_features // (self.group_size or in_features)
        reading.require_shape(module, headers, "scales", reading.SCALE_DTYPES, (groups, words * AWQ_PACK))
        if "qzeros" in headers or not self.symmetric:
            reading.require_shape(module, headers, "qzeros", (torch.int32,), (groups, words))
        return IntegerScheme(BITS, self.group_size, self.symmetric)

    def read(self, module: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        scheme = self.scheme(module, reading.headers_of(tensors))
        assert isinstance(scheme, IntegerScheme)
        if self.version != "gemm":
            return awq_gemv.read(module, tensors, self.version, scheme)
        canonical = {
            "codes": unpack_awq(tensors["qweight"]).T.contiguous(),  # [K, N] -> [N, K]
            "scales": tensors["scales"].T.contiguous(),  # [G, N] -> [N, G]
        }
        if "qzeros" in tensors:
            zeros = unpack_awq(tensors["qzeros"]).T.contiguous()
            if not self.symmetric:
                canonical["zeros"] = zeros
            elif not (zeros == SYMMETRIC_ZERO).all():
                raise InputError(
                    f"{module}.qzeros are not all 8, although quantization_config says that they are symmetric",
                    hint='with "zero_point": true and without "sym" they are read as they are',
                )
        codes = canonical["codes"]
        if "g_idx" in tensors:
            _check_sequential(module, tensors["g_idx"], codes.shape[1], self.group_size)
        return QuantizedWeight(scheme, canonical, (codes.shape[0], codes.shape[1]))

    def write(self, module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = weight.scheme
        assert isinstance(scheme, IntegerScheme)
        writing.checked(module, weight, IntegerScheme(BITS, self.group_size, scheme.symmetric))
        out_features, in_features = weight.shape
        writing.require_multiple("awq", module, "out_features", out_features, AWQ_PACK)
        writing.require_multiple("awq", module, "in_features", in_features, self.group_size or 1)
        scales = writing.exact_cast("awq", module, "scales", weight["scales"], torch.float16)
        zeros = torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8) if scheme.symmetric else weight["zeros"]
        return {
            "qweight": pack_awq(weight["codes"].T),
            "qzeros": pack_awq(zeros.T),
            "scales": scales.T.contiguous(),
        }


def _refuse_ambiguous_skips(modules: list[str], dense_modules: list[str]) -> None:
    """`modules_to_not_convert` matches by substring: "mlp.gate" would also skip "mlp.gate_proj"."""
    for dense in dense_modules:
        for module in modules:
            if dense in module:
                raise UsageError(
                    f"awq cannot leave {dense} dense and quantize {module}: its readers skip names that contain "
                    f"one of modules_to_not_convert",
                    hint="write gptq or compressed-tensors, or leave both dense",
                )


def _check_sequential(module: str, index: Tensor, in_features: int, group_size: int | None) -> None:
    """Refuse an activation order, which AWQ does not have: without it the numbers would be others."""
    if index.shape != (in_features,) or not torch.equal(
        index.long(), torch.arange(in_features) // (group_size or in_features)
    ):
        raise InputError(f"{module}.g_idx is an activation order, which AWQ does not have")
