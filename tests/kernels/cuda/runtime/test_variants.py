"""Every listed kernel compiles for every architecture it claims, without a GPU, and is what it promises to be."""

from __future__ import annotations

import pytest

from aphroquant.kernels.cuda.compiler import CompiledKernel, compile_all
from aphroquant.kernels.cuda.variant_check import problems
from aphroquant.kernels.cuda.variants import ARCHITECTURES, KernelVariant, all_variants


def test_listed_kernels_compile_within_their_spills_and_with_their_instructions(nvrtc: None) -> None:
    work = [(variant, name) for variant in all_variants() if variant.tested for name in variant.architectures]
    results = compile_all(((variant.source, variant.macros, name) for variant, name in work), 2)
    found = []
    for (variant, _), result in zip(work, results, strict=True):
        found += problems(variant, result) if isinstance(result, CompiledKernel) else [str(result)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("variant", all_variants(), ids=str)
def test_architectures_are_known(variant: KernelVariant) -> None:
    assert set(variant.architectures) <= set(ARCHITECTURES)
