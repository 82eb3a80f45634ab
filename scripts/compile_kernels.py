"""Compiles every kernel that kernels/cuda/*/variants.py list, for every architecture, and checks the machine code.

Needs NVRTC (nvidia-cuda-nvrtc and nvidia-cuda-runtime, or a CUDA toolkit), and no GPU. Prints a table of what each
kernel uses; ends with 1 if one does not compile, spills more than it may, or lacks an instruction.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from aphroquant.kernels.cuda.compiler import CompiledKernel, compile_all
from aphroquant.kernels.cuda.variant_check import problems
from aphroquant.kernels.cuda.variants import KernelVariant, all_variants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--arch", help="this architecture only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (default: all CPUs)")
    arguments = parser.parse_args()
    work = [
        (variant, architecture)
        for variant in all_variants()
        for architecture in variant.architectures
        if arguments.only in str(variant) and arguments.arch in (None, architecture)
    ]
    start = time.perf_counter()
    results = compile_all(((v.source, v.macros, architecture) for v, architecture in work), arguments.jobs)
    failures = []
    for (variant, architecture), result in zip(work, results, strict=True):
        if isinstance(result, CompiledKernel):
            failures += problems(variant, result)
            print(describe(variant, result))
        else:
            failures.append(str(result))
            print(f"{architecture:8}{variant}  does not compile")
    print(f"{len(work)} kernels in {time.perf_counter() - start:.1f} s, {len(failures)} problems")
    for failure in failures:
        print(f"- {failure}")
    return 1 if failures else 0


def describe(variant: KernelVariant, compiled: CompiledKernel) -> str:
    """One line."""
    used = compiled.resources.get(variant.entry)
    numbers = f"{used.registers:4} registers {used.spills:5} B spilled {used.shared:6} B shared" if used else "?"
    return f"{compiled.architecture:8}{numbers}  {variant}"


if __name__ == "__main__":
    sys.exit(main())
