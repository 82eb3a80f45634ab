"""Reading instructions from a cubin: counted as NVIDIA's own disassembler counts them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from aphroquant.kernels.cuda.compiler import compile_kernel
from aphroquant.kernels.cuda.machine_code import NAMES, count_instructions, entries
from aphroquant.kernels.cuda.resources import parse_resources
from aphroquant.kernels.cuda.variant_check import problems
from aphroquant.kernels.cuda.variants import ARCHITECTURES, KernelVariant

VARIANT = KernelVariant("launch_probe.cu", "launch_probe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_and_stores_are_found_by_width(nvrtc: None, architecture: str) -> None:
    counts = count_instructions(compile_kernel("launch_probe.cu", {}, architecture).cubin, "launch_probe")
    assert counts["LDG.32"] == counts["STG.32"] == 1
    assert counts["LDG"] == 1
    assert counts["LDL"] == counts["STL"] == counts["HGMMA"] == 0
    assert counts["ACQBULK"] == counts["PREEXIT"] == (architecture == "sm_90a")


def test_a_cubin_names_its_kernels(nvrtc: None) -> None:
    assert {"launch_probe", "tensor_map_probe"} < set(entries(compile_kernel("launch_probe.cu", {}, "sm_90a").cubin))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_agree_with_the_disassembler(nvrtc: None, architecture: str, tmp_path: Path) -> None:
    tool = shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    cubin = tmp_path / "probe.cubin"
    cubin.write_bytes(compile_kernel("launch_probe.cu", {}, architecture).cubin)
    text = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for part in text.split("Function : ")[1:]:
        entry = part.split()[0]
        names = re.findall(r"\*/\s+(?:@!?U?P\w+ +)?([A-Z0-9]+)[.\w]* .*?;", part)
        expected = Counter(name for name in names if name in NAMES)
        found = Counter({k: v for k, v in count_instructions(cubin.read_bytes(), entry).items() if "." not in k})
        assert found == expected


def test_resources_are_read_from_the_compilers_log() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
ptxas         .     80 bytes stack frame, 44 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 80 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 3.2 ms
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""
    first, second = parse_resources(log).values()
    assert (first.entry, first.registers, first.spills, first.stack, first.shared) == ("first", 255, 80, 80, 4096)
    assert (second.entry, second.registers, second.spills, second.shared) == ("second", 10, 0, 0)


def test_a_kernel_that_spills_or_lacks_an_instruction_is_told(nvrtc: None) -> None:
    compiled = compile_kernel("launch_probe.cu", {}, "sm_80")
    assert problems(VARIANT, compiled) == []
    wrong = KernelVariant(
        "launch_probe.cu", "launch_probe", {"BITS": 4}, sass=("HMMA", "LDG.E.128", "LDG"), no_sass=("STG",)
    )
    assert problems(wrong, compiled) == [
        "launch_probe(BITS=4) for sm_80 has no HMMA",
        "launch_probe(BITS=4) for sm_80 has no LDG.E.128",
        "launch_probe(BITS=4) for sm_80 has 1 STG",
    ]
    (unknown,) = problems(KernelVariant("launch_probe.cu", "launch_probe", sass=("HMMMA",)), compiled)
    assert "unknown instructions HMMMA; known are ACQBULK" in unknown
    (missing,) = problems(KernelVariant("launch_probe.cu", "launch"), compiled)
    assert "launch_probe.cu has no kernel launch, only" in missing


def test_too_many_spills_are_told(nvrtc: None) -> None:
    compiled = compile_kernel("launch_probe.cu", {}, "sm_80")
    (found,) = problems(KernelVariant("launch_probe.cu", "launch_probe", max_spill_bytes=-1), compiled)
    assert found == "launch_probe() for sm_80 spills 0 bytes of registers, and may spill -1"
