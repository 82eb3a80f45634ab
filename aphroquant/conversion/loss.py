"""Whether a quantized source keeps its numbers: never changed without being asked, and always said."""

from __future__ import annotations

from aphroquant.checkpoint import Checkpoint
from aphroquant.conversion.request import PER_ROW, ConversionRequest
from aphroquant.conversion.targets import can_be_quantized_for, quantizable_targets
from aphroquant.errors import UsageError
from aphroquant.schemes import IntegerScheme, Scheme

DENSE_OUTCOME = "quantized from a dense source"


class LossError(UsageError):
    """The target cannot hold the source's numbers. Only `--requantize` goes on from here."""


def refuse_loss(checkpoint: Checkpoint, request: ConversionRequest, reason: str) -> UsageError:
    """The error for a quantized source that `request` would change, in one sentence."""
    message = (
        f"{checkpoint.source} is quantized already, and its numbers cannot stay as they are in {request.to}: {reason}"
    )
    if can_be_quantized_for(request.to):
        return UsageError(message, hint="--requantize dequantizes it and quantizes it anew, with a loss")
    able = ", ".join(quantizable_targets())
    return UsageError(message, hint=f"--requantize can write {able}, but not {request.to}")


def contradiction(request: ConversionRequest, scheme: Scheme) -> str | None:
    """Which option asks for other numbers than a source of this scheme has; None if none does."""
    given = {
        f"--scheme {request.scheme}": request.scheme is not None,
        **_settings(request, scheme),
        f"--solver {request.solver}": request.solver is not None,
        "--ignore": bool(request.ignore),
        "--rule": bool(request.rules),
        "--size": request.size is not None,
        "--calibration": bool(request.calibration),
        "--refine-steps": bool(request.refine_steps),
        "--distill-steps": bool(request.distill_steps),
    }
    option = next((option for option, contradicts in given.items() if contradicts), None)
    return None if option is None else f"{option} asks for others than the {scheme} that it has"


def _settings(request: ConversionRequest, scheme: Scheme) -> dict[str, bool]:
    """Options that differ from the scheme. Only integers have these settings."""
    bits: int | None = None
    size: int | None = None
    symmetric: bool | None = None
    if isinstance(scheme, IntegerScheme):
        bits, symmetric = scheme.bits, scheme.symmetric
        size = PER_ROW if scheme.group_size is None else scheme.group_size
    return {
        f"--bits {request.bits}": request.whole_bits not in (None, bits) or request.average_bits is not None,
        f"--group-size {request.group_size}": request.group_size not in (None, size),
        "--symmetric" if request.symmetric else "--asymmetric": request.symmetric not in (None, symmetric),
    }


def repacked(num_layers: int, num_rescaled: int = 0) -> str:
    """What to say of layers that were read back and compared. `num_rescaled`: those whose global scale was rounded."""
    if not num_rescaled:
        return f"lossless: every one of {num_layers} layers dequantizes to the same bits"
    return (
        f"lossless but for a rounding: all codes and block scales of {num_layers} layers are the same bits, and the "
        f"global scales of {num_rescaled} are rounded to float32 (each weight by 2**-24 at most)"
    )


def would_be_repacked(num_layers: int) -> str:
    """The same of a dry run, which has looked at headers and scales only."""
    return f"would be lossless by headers and scales: {num_layers} layers keep their numbers"


def requantized(reason: str) -> str:
    return f"requantized, because {reason}"
