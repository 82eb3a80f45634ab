"""The fused kernels of well-known shapes, for checking their machine code and for compiling ahead."""

from __future__ import annotations

from aphroquant.kernels.cuda.fused.elements import OutputFormat, row_threads
from aphroquant.kernels.cuda.variants import KernelVariant


def _norms(hidden_size: int, output: OutputFormat) -> list[KernelVariant]:
    macros = {"HIDDEN_SIZE": hidden_size, "THREADS": row_threads(hidden_size), "OUTPUT_FORMAT": int(output)}
    wide = ("LDG.E.128",)
    return [
        KernelVariant("fused_rms_norm.cu", "fused_rms_norm", {**macros, "HAS_DELTA": delta, "HAS_ROWS": 0}, sass=wide)
        for delta in (0, 1)
    ] + [KernelVariant("fused_rms_norm.cu", "fused_rms_norm", {**macros, "HAS_DELTA": 1, "HAS_ROWS": 1}, sass=wide)]


def _activation(size: int, output: OutputFormat) -> KernelVariant:
    threads = 256 if output is OutputFormat.ELEMENT else row_threads(size)
    macros = {"SIZE": size, "THREADS": threads, "ACTIVATION": 0, "OUTPUT_FORMAT": int(output)}
    return KernelVariant("fused_gated_activation.cu", "fused_gated_activation", macros, sass=("LDG.E.128",))


def _rotary(head_dim: int, heads: int, kv_heads: int, cache: int, has_norm: bool) -> KernelVariant:
    macros = {
        "HEAD_DIM": head_dim,
        "NUM_HEADS": heads,
        "NUM_KV_HEADS": kv_heads,
        "BLOCK_SIZE": 16,
        "KEY_FORMAT": cache,
        "VALUE_FORMAT": cache,
        "ROTARY_DIM": head_dim,
        "HAS_NORM": int(has_norm),
        "THREADS": 128,
    }
    return KernelVariant("fused_rotary_cache.cu", "fused_rotary_cache", macros, no_sass=("LDL", "STL"))


VARIANTS = (
    *(variant for output in OutputFormat for variant in _norms(4096, output)),
    *(_activation(14336, output) for output in OutputFormat),
    *(_rotary(128, 32, 8, cache, has_norm=False) for cache in range(4)),
    _rotary(128, 32, 8, 0, has_norm=True),
    _rotary(64, 9, 3, 1, has_norm=False),
    KernelVariant("fused_embedding.cu", "fused_embedding", {"HIDDEN_SIZE": 4096, "THREADS": 256}),
)
