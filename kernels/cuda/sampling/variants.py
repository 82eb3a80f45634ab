"""The sampling kernel, for checking its machine code and for compiling ahead."""

from __future__ import annotations

from aphroquant.kernels.cuda.variants import KernelVariant

VARIANTS = (KernelVariant("sample_tokens.cu", "sample_tokens", {"THREADS": 1024}, sass=("LDG.E.128",)),)
