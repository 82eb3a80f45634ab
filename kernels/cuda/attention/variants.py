"""The attention kernels of well-known shapes, for checking their machine code and for compiling ahead."""

from __future__ import annotations

from aphroquant.kernels.cuda.variants import KernelVariant, Macro

_FORMATS = range(4)  # bf16, fp16, FP8, int8


def _shape(head_dim: int, group: int, num_kv_heads: int, cache_format: int) -> dict[str, int]:
    return {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": 16,
        "KEY_FORMAT": cache_format,
        "VALUE_FORMAT": cache_format,
        "ELEMENT_IS_BF16": int(cache_format != 1),
    }


def _variants(head_dim: int, group: int, num_kv_heads: int, cache_format: int, *, tested: bool) -> list[KernelVariant]:
    shape = _shape(head_dim, group, num_kv_heads, cache_format)
    tiles = 2 if cache_format >= 2 else 1
    return [
        KernelVariant(
            "attention_decode.cu",
            "attention_decode",
            {**shape, "WARPS": 4 if head_dim <= 128 else 2, "STAGES": 3, "TILES": tiles},
            sass=("HMMA", "LDGSTS"),
            no_sass=("LDL", "STL"),
            tested=tested,
        ),
        KernelVariant(
            "attention_prefill.cu",
            "attention_prefill",
            {**shape, "WARPS": 8},
            max_spill_bytes=32 if head_dim <= 128 else 256,  # outside of the loop
            sass=("HMMA", "LDSM"),
            tested=tested,
        ),
    ]


def _hopper(head_dim: int, group: int, num_kv_heads: int, cache_format: int, *, tested: bool) -> KernelVariant:
    """As WgmmaPrefill compiles it. What comes from 16-bit caches is fetched as tiles, codes as contiguous bytes."""
    wide = cache_format < 2  # 16-bit items
    tile: dict[str, Macro] = {
        "WARPGROUPS": 3 if head_dim == 64 and wide else 2,
        "TILE": 160 if head_dim == 128 and wide else 128,
        "STAGES": 2,
    }
    return KernelVariant(
        "attention_prefill_wgmma.cu",
        "attention_prefill_wgmma",
        {**_shape(head_dim, group, num_kv_heads, cache_format), **tile, "STAGED": 2},
        ("sm_90a",),
        sass=("HGMMA", "UBLKCP" if cache_format == 2 else "UTMALDG"),
        no_sass=("LDL", "STL", "HMMA"),
        tested=tested,
    )


VARIANTS = (
    *(variant for cache in _FORMATS for variant in _variants(128, 4, 8, cache, tested=True)),
    *_variants(64, 3, 3, 1, tested=True),
    *_variants(64, 4, 8, 0, tested=False),
    *_variants(96, 1, 32, 0, tested=False),
    *_variants(128, 8, 8, 0, tested=False),
    *_variants(256, 4, 4, 0, tested=False),
    *(_hopper(128, 4, 8, cache, tested=cache != 1) for cache in (0, 1, 2)),
    _hopper(64, 3, 3, 1, tested=True),
    _hopper(64, 4, 8, 2, tested=False),
)
