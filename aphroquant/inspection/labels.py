"""Labels against numbers: zero points that are one off, and codes, zero points or scales in another order."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from aphroquant.inspection.arrangement import Arrangement, Fit
from aphroquant.inspection.findings import Finding
from aphroquant.inspection.profile import Profile
from aphroquant.schemes import IntegerScheme

ENOUGH_GROUPS = 256
UNCERTAIN_SHIFT = 0.1
FITTING_ZEROS, UNFITTING_ZEROS = 0.8, 0.5  # correlations: those of sound files are 0.83 to 0.99
LOST_ZEROS = 0.3
FITTING_SCALES = 0.05  # sound files have 0.1 to 0.8, of which another order leaves a quarter
_NOT_THE_ORDER = {"interleaved": "the order of AWQ", "sequential": "plain sequential order"}


def label_findings(profiles: Sequence[Profile], format_name: str) -> Iterator[Finding]:
    """Findings about the checkpoint as a whole, from all its integer matrices."""
    chosen = [found for found in profiles if isinstance(found.scheme, IntegerScheme) and found.arrangement.groups]
    total = Arrangement()
    for found in chosen:
        total.merge(found.arrangement)
    if total.groups < ENOUGH_GROUPS:
        return
    # Of few weights, and of 8 bits with their small steps, the mean is too uncertain to tell a step from none.
    certain = total.shift_error < UNCERTAIN_SHIFT and _is_a_step(total.mean_shift)
    shifted = list(_shift_finding(chosen, format_name)) if certain else []
    yield from shifted or _order_findings(total, format_name)
    yield from _wrapping_finding(chosen, format_name)


def _shift_finding(chosen: Sequence[Profile], format_name: str) -> Iterator[Finding]:
    shifts = [found.arrangement.mean_shift for found in chosen]
    shift = statistics.median(shifts)
    if not _is_a_step(shift):
        return
    number = sum(map(_is_a_step, shifts))
    where = "small" if shift > 0 else "large"
    message = (
        f"the zero points of {number} of {len(chosen)} layers are one too {where}: the mean weight lies "
        f"{shift:+.2f} steps from zero"
    )
    if format_name in ("gptq", "gptq-v1", "auto-round"):
        key = "packing_format" if format_name == "auto-round" else "checkpoint_format"
        label = "v1 (zero points stored less one)" if shift > 0 else "v2 (zero points stored as they are)"
        advice = f"the label is wrong: set {key} in quantization_config to GPTQ {label}"
    else:
        advice = "a converter shifted them, or left GPTQ's shift in: convert again from the source"
    yield Finding("error", "zero-points-shifted", "zero points", message, advice, "config.json")


def _is_a_step(shift: float) -> bool:
    return 0.6 < abs(shift) < 1.4


def _order_findings(total: Arrangement, format_name: str) -> Iterator[Finding]:
    fits = total.fits()
    as_read = fits[""]
    others = {name: fit for name, fit in fits.items() if name}
    if total.zeros_vary:
        yield from _zero_order_finding(as_read, others)
    noise = 5 / total.groups**0.5
    best = max(others, key=lambda name: others[name].scales, default="")
    if best and others[best].scales > max(FITTING_SCALES, noise) and as_read.scales < 0.6 * others[best].scales:
        name = format_name.removesuffix("-v1")
        message = (
            f"the scales do not belong to the codes as {name} orders them, but do in {_NOT_THE_ORDER[best]} "
            f"(correlation {others[best].scales:.2f} against {as_read.scales:.2f})"
        )
        yield Finding("error", "codes-misordered", "packed codes", message, _repack(), "")


def _zero_order_finding(as_read: Fit, others: dict[str, Fit]) -> Iterator[Finding]:
    best = max(others, key=lambda name: others[name].zeros, default="")
    if best and as_read.zeros < UNFITTING_ZEROS and others[best].zeros > FITTING_ZEROS:
        message = (
            f"the zero points do not belong to the codes as read, but do in {_NOT_THE_ORDER[best]} "
            f"(correlation {others[best].zeros:.2f} against {as_read.zeros:.2f})"
        )
        yield Finding("error", "zero-points-misordered", "zero points", message, _repack(), "")
    elif as_read.zeros < LOST_ZEROS:
        message = f"the zero points do not follow the codes of their groups (correlation {as_read.zeros:.2f})"
        advice = "sound files have 0.8 and more: a lost activation order, or tensors of different layers"
        yield Finding("warning", "zero-points-unrelated", "zero points", message, advice, "")


def _wrapping_finding(chosen: Sequence[Profile], format_name: str) -> Iterator[Finding]:
    count = sum(found.wrapping_zeros for found in chosen)
    if not count or format_name != "gptq-v1":
        return
    message = f"{count} zero points of 0 are stored as their largest value, which GPTQ v1 wraps to"
    advice = "kernels that add one without masking misread them: convert to gptq again, which writes v2"
    yield Finding("warning", "zero-points-wrap", "zero points", message, advice, "")


def _repack() -> str:
    return "the tool that packed the file used another order: convert again from its source"
