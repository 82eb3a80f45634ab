"""What the figures of one matrix say about it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from aphroquant.inspection.findings import Finding, Severity
from aphroquant.inspection.profile import LARGEST_FP8, Profile, Scales
from aphroquant.schemes import (
    AdditiveScheme,
    DenseScheme,
    FloatScheme,
    IntegerScheme,
    KQuantScheme,
    LookupScheme,
)

ENOUGH = 4096  # weights; below it, shares of them say little
IMPLAUSIBLE_RMS = 100.0  # trained layers lie between 1e-4 and 10
TINY_RMS = 1e-9
MANY_COARSE = 0.01
MANY_SATURATED = 0.01
LITTLE_RANGE = 0.25
FEW_ENTRIES = 0.5
MANY_ZERO_ROWS = 0.5
BLOCKS_WITHOUT_EXTREME = 0.1

_DAMAGED = "the file is damaged or the quantizer failed on this layer: quantize it again from the original"


def number_findings(found: Profile, file: str, *, is_gguf: bool, is_embedding: bool) -> Iterator[Finding]:
    """Everything odd about the matrix `found.module`."""

    def finding(severity: Severity, check: str, message: str, advice: str = "", tensor: str = "") -> Finding:
        subject = f"{found.module}.{tensor}" if tensor else found.module
        return Finding(severity, check, subject, message, advice, file)

    if not found.count:
        yield finding("error", "empty", f"has the shape {list(found.shape)}", _DAMAGED)
        return
    for name, scales in found.scales.items():
        for severity, check, message, advice in _scale_findings(found, name, scales, is_gguf):
            yield finding(severity, check, message, advice, name)
    if found.not_finite and not any(scales.not_finite for scales in found.scales.values()):
        what = f"{found.not_finite} of {found.count} weights are NaN or infinite"
        yield finding("error", "weights-not-finite", what, _DAMAGED)
    for severity, check, message, advice in (*_zero_findings(found, is_embedding), *_size_findings(found)):
        yield finding(severity, check, message, advice)
    for severity, check, message, advice in _code_findings(found):
        yield finding(severity, check, message, advice)


Told = tuple[Severity, str, str, str]


def _scale_findings(found: Profile, name: str, scales: Scales, is_gguf: bool) -> Iterator[Told]:
    if scales.not_finite:
        what = f"{scales.not_finite} of {scales.count} numbers are NaN or infinite"
        yield "error", "scales-not-finite", what, _DAMAGED
    if scales.negative and _must_be_positive(found, name):
        what = f"{scales.negative} of {scales.count} numbers are negative"
        yield "error", "scales-negative", what, _DAMAGED
    if scales.lost:
        what = f"{scales.lost} of {scales.count} scales are zero, although codes of their groups are not"
        advice = "those weights read as zero; scales that float16 cannot hold need bfloat16 or float32"
        yield ("info" if is_gguf else "error"), "scales-zero", what, advice
    if scales.coarse > MANY_COARSE * scales.count:
        what = f"{scales.coarse / scales.count:.0%} of the numbers are subnormal, down to {scales.smallest:.2g}"
        other = "a type of 16 bits" if is_gguf else "bfloat16 or float32 scales"
        yield "warning", "scales-subnormal", what, f"they have lost digits; {other} would keep them"


def _must_be_positive(found: Profile, name: str) -> bool:
    if name in ("global_scale", "input_scale"):
        return True
    if isinstance(found.scheme, LookupScheme):
        return name == "scales" and found.scheme.table not in ("iq4_nl", "nf4")  # uneven tables, used both ways round
    return isinstance(found.scheme, FloatScheme) and name == "scales"


def _zero_findings(found: Profile, is_embedding: bool) -> Iterator[Told]:
    if found.not_finite:
        return
    if found.is_zero:
        yield "error", "all-zero", "all weights are zero", "a layer or expert that was never written: get it again"
    elif found.zero_rows:
        many = found.zero_rows > MANY_ZERO_ROWS * found.shape[0] and not is_embedding
        why = "tokens that were never trained" if is_embedding else "outputs that are always zero, as after pruning"
        what = f"{found.zero_rows} of {found.shape[0]} rows are all zero"
        yield ("warning" if many else "info"), "zero-rows", what, why


def _size_findings(found: Profile) -> Iterator[Told]:
    if found.not_finite or found.is_zero:
        return
    if found.rms > IMPLAUSIBLE_RMS:
        dense = isinstance(found.scheme, DenseScheme)
        what = f"the weights are implausibly large: {found.rms:.3g} on average (root mean square)"
        advice = "damaged, or never trained" if dense else "the scales are probably stored as their reciprocals"
        yield ("warning" if dense else "error"), "implausible-size", what, advice
    if found.rms < TINY_RMS:
        what = f"the weights are implausibly small: {found.rms:.3g} on average (root mean square)"
        yield (
            "warning",
            "implausible-size",
            what,
            "the scales may be stored as their reciprocals, or the layer is unused",
        )


def _code_findings(found: Profile) -> Iterator[Told]:
    scheme = found.scheme
    if isinstance(scheme, AdditiveScheme):
        yield from _codebook_findings(found, scheme)
    if found.levels is None or found.count < ENOUGH or found.is_zero:
        return
    if isinstance(scheme, FloatScheme):
        yield from _fp8_findings(found)
        return
    assert isinstance(scheme, IntegerScheme | LookupScheme | KQuantScheme)
    used = int((found.levels > 0).sum())
    if used <= 2 ** (scheme.bits - 1) and scheme.bits > 1:
        what = f"only {used} of {2**scheme.bits} codes occur"
        advice = f"quantized with fewer than {scheme.bits} bits, or damaged"
        yield "warning", "codes-unused", what, advice
    elif found.groups and scheme.bits > 2 and found.range_use / found.groups < LITTLE_RANGE:
        what = f"the codes use {found.range_use / found.groups:.0%} of their range on average"
        yield "warning", "range-unused", what, "the scales are too large for the weights: quantize again"
    if found.blocks and found.blocks_without_extreme > BLOCKS_WITHOUT_EXTREME * found.blocks:
        share = found.blocks_without_extreme / found.blocks
        what = f"in {share:.0%} of the blocks no value reaches the block's scale, which is its largest magnitude"
        yield "warning", "blocks-without-extreme", what, "the table (nf4, fp4) or the block size may be mislabelled"


def _fp8_findings(found: Profile) -> Iterator[Told]:
    assert found.levels is not None
    by_right = found.scales["scales"].count  # the largest weight under each scale
    saturated = (int(found.levels[LARGEST_FP8]) - by_right) / found.count
    if saturated > MANY_SATURATED:
        what = f"{saturated:.1%} of the codes are the largest that FP8 has"
        yield "warning", "codes-saturated", what, "the scale is too small and weights are cut off: quantize again"
    magnitudes = found.levels[: LARGEST_FP8 + 1].nonzero()
    if magnitudes.numel() and int(magnitudes.max()) < LARGEST_FP8 - 4 * 8:  # 8 codes an octave
        what = "the codes use less than a sixteenth of FP8's range"
        yield "info", "range-unused", what, "harmless but for the smallest weights; the scale may be a fused layer's"


def _codebook_findings(found: Profile, scheme: AdditiveScheme) -> Iterator[Told]:
    assert found.used is not None
    entries = 2**scheme.code_bits
    vectors = found.count // (scheme.in_group * scheme.out_group)
    likely = entries * -math.expm1(-vectors / entries)  # of as many random codes
    for book, used in enumerate(found.used.sum(1).tolist()):
        name = f"codebook {book}: " if scheme.num_codebooks > 1 else ""
        what = f"{name}{used} of {entries} entries are used ({used / entries:.0%})"
        if used < FEW_ENTRIES * likely:
            yield "warning", "codebook-unused", what, "unused entries are wasted bits: train the codebooks anew"
        else:
            yield "info", "codebook-use", what, ""
