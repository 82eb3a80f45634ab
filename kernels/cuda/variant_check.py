"""Whether a compiled kernel is what its variant promises: spills within bounds, and the instructions that matter."""

from __future__ import annotations

from aphroquant.kernels.cuda.compiler import CompiledKernel
from aphroquant.kernels.cuda.machine_code import NAMES, count_instructions
from aphroquant.kernels.cuda.variants import KernelVariant


def problems(variant: KernelVariant, compiled: CompiledKernel) -> list[str]:
    """What is wrong, one sentence each."""
    where = f"{variant} for {compiled.architecture}"
    used = compiled.resources.get(variant.entry)
    if used is None:
        return [f"{where}: {variant.source} has no kernel {variant.entry}, only {', '.join(compiled.resources)}"]
    found = []
    if used.spills > variant.max_spill_bytes:
        found.append(f"{where} spills {used.spills} bytes of registers, and may spill {variant.max_spill_bytes}")
    if unknown := [name for name in (*variant.sass, *variant.no_sass) if _plain(name) not in NAMES]:
        return [*found, f"{where}: unknown instructions {', '.join(unknown)}; known are {', '.join(sorted(NAMES))}"]
    counts = count_instructions(compiled.cubin, variant.entry)
    found += [f"{where} has no {name}" for name in variant.sass if not counts[_plain(name)]]
    found += [f"{where} has {counts[_plain(name)]} {name}" for name in variant.no_sass if counts[_plain(name)]]
    return found


def _plain(name: str) -> str:
    """LDG.E.128, as the disassembler prints it, is LDG.128 here."""
    return name.replace(".E", "")
