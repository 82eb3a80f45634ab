"""`convert` moves table, float and integer weights between formats without a change, files to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.conversion import convert
from aphroquant.formats import format_class
from aphroquant.schemes import (
    ActivationScheme,
    AffineScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    LookupScheme,
    QuantizedWeight,
    Scheme,
)

FP4_INPUTS = ActivationScheme("float", 4, granularity="group", group_size=16)
STATIC_INPUTS = ActivationScheme("float", dynamic=False, granularity="tensor")
NVFP4 = LookupScheme("e2m1", 16, "e4m3", activations=FP4_INPUTS)
W4, W4_ASYM = IntegerScheme(4, 32, symmetric=True), IntegerScheme(4, 32, symmetric=False)
FP8 = FloatScheme("tensor", activations=STATIC_INPUTS)
FP8_ROWS = FloatScheme("channel", activations=ActivationScheme("float"))
PAIRS = [
    (NVFP4, "compressed-tensors", "modelopt"),
    (NVFP4, "modelopt", "compressed-tensors"),
    (LookupScheme("e2m1", 16, "e4m3"), "modelopt", "compressed-tensors"),
    (FP8, "modelopt", "compressed-tensors"),
    (FP8, "fp8", "modelopt"),
    (FP8_ROWS, "modelopt", "compressed-tensors"),
    (W4, "auto-round", "gptq"),
    (W4_ASYM, "gptq", "auto-round"),
    (W4_ASYM, "auto-round", "awq"),
    (W4_ASYM, "awq", "hqq"),
    (W4, "gptq", "hqq"),
    (AffineScheme(3, 64), "hqq", "hqq"),
    (IntegerScheme(8, None, symmetric=True), "bitsandbytes", "compressed-tensors"),
    (IntegerScheme(8, None, symmetric=True), "gptq", "bitsandbytes"),
    (LookupScheme("nf4", 64, "nested", flattened=True), "bitsandbytes", "bitsandbytes"),
]


def random_weight(scheme: Scheme, n: int, k: int) -> QuantizedWeight:
    dtypes = {"global_scale": torch.float64, **scheme.dtypes()}
    if isinstance(scheme, LookupScheme):
        dtypes["input_scale"] = torch.float64
    if isinstance(scheme, FloatScheme):
        dtypes |= {"codes": torch.float8_e4m3fn, "input_scale": torch.float32}
    shapes = scheme.shapes(n, k) | ({"input_scale": ()} if scheme == FP8 else {})
    tensors = {}
    for name, shape in shapes.items():
        bits = scheme.storage_bits(name)
        if name in ("codes", "zeros") and bits is not None:
            tensors[name] = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        else:
            tensors[name] = torch.rand(shape).mul(100).half().to(dtypes.get(name, torch.float16))
        if name.startswith("nested"):
            tensors[name] = torch.rand(shape)
    return QuantizedWeight(scheme, tensors, (n, k))


def write_source(dense: Path, out: Path, scheme: Scheme, name: str) -> None:
    """The dense checkpoint with its projections replaced by random weights of a scheme."""
    source = open_checkpoint(dense)
    modules = [module for module in source.schemes() if "proj" in module]
    format = format_class(name).for_schemes(dict.fromkeys(modules, scheme), ["lm_head"])
    with CheckpointWriter(out) as writer:
        for stored in source.tensors:
            if stored.removesuffix(".weight") not in modules:
                writer.add(stored, source.read(stored))
        for module in modules:
            n, k = source.info(f"{module}.weight").shape
            for suffix, tensor in format.write(module, random_weight(scheme, n, k)).items():
                writer.add(format.place(module, suffix).name, tensor)
        for path in source.carried_files():
            writer.add_file(path)
        writer.finish(source.config | {"quantization_config": format.quantization_config()})


@pytest.mark.parametrize(("scheme", "source", "target"), PAIRS, ids=str)
def test_repacking_loses_nothing(
    scheme: Scheme, source: str, target: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    write_source(tiny_checkpoint("llama"), tmp_path / "source", scheme, source)
    result = convert(tmp_path / "source", to=target, out=tmp_path / "out")
    assert result.mode == "repack"
    before, after = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "out")
    assert after.format_name == target
    quantized = {module for module, found in before.schemes().items() if not isinstance(found, DenseScheme)}
    assert len(quantized) == 14
    for module in quantized:
        assert not isinstance(after.schemes()[module], DenseScheme)
        assert after.weight(module).same_values(before.weight(module))
    for name in before.dense_names():
        assert torch.equal(after.read(name), before.read(name)), name
