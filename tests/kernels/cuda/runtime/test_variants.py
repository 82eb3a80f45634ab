"""Listed kernels compile without a GPU, and are what they promise to be.

scripts/compile_kernels compiles all of them for every architecture; here it is a choice that takes seconds: every
tested variant for the newest architecture that it lists, and the first one of each kernel for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aphroquant.kernels.cuda.compiler import CompiledKernel, compile_all
from aphroquant.kernels.cuda.sources import SOURCE_ROOT, included_files
from aphroquant.kernels.cuda.variant_check import problems
from aphroquant.kernels.cuda.variants import ARCHITECTURES, KernelVariant, all_variants, prebuilt_variants


def _chosen() -> Iterator[tuple[KernelVariant, str]]:
    seen = set()
    for variant in all_variants():
        if not variant.tested:
            continue
        first = (variant.source, variant.entry) not in seen
        seen.add((variant.source, variant.entry))
        for architecture in variant.architectures if first else variant.architectures[-1:]:
            yield variant, architecture


def test_listed_kernels_compile_within_their_spills_and_with_their_instructions(nvrtc: None) -> None:
    work = list(_chosen())
    results = compile_all(((variant.source, variant.macros, name) for variant, name in work), 2)
    found = []
    for (variant, _), result in zip(work, results, strict=True):
        found += problems(variant, result) if isinstance(result, CompiledKernel) else [str(result)]
    assert not found, "\n".join(found)


def test_every_source_is_listed() -> None:
    listed = {variant.source for variant in all_variants() if variant.tested}
    assert {path.relative_to(SOURCE_ROOT).as_posix() for path in SOURCE_ROOT.rglob("*.cu")} == listed


def test_every_header_is_used() -> None:
    used = {path for source in SOURCE_ROOT.rglob("*.cu") for path in included_files(source)}
    assert set(SOURCE_ROOT.rglob("*.cuh")) <= used


@pytest.mark.parametrize("variant", all_variants(), ids=str)
def test_architectures_are_known(variant: KernelVariant) -> None:
    assert set(variant.architectures) <= set(ARCHITECTURES)


def test_a_gpu_gets_what_it_can_run() -> None:
    def names(architecture: str) -> set[str]:
        return {variant.entry for variant in prebuilt_variants(architecture)}

    assert "launch_probe" in names("sm_80") & names("sm_86") & names("sm_90a") & names("sm_120")
    assert "tensor_map_probe" in names("sm_90a")
    assert "tensor_map_probe" not in names("sm_80") | names("sm_86") | names("sm_100")
