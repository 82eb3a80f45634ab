"""Scales that the target cannot hold, found before any work: they are a small part of the file, and read alone."""

from __future__ import annotations

from collections.abc import Collection

import torch

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import COMPANIONS, suffix
from aphroquant.conversion.loss import LossError
from aphroquant.conversion.soundness import check_codes
from aphroquant.errors import UsageError
from aphroquant.formats import writing
from aphroquant.formats.base import TensorHeader

FLOAT16_TARGETS = ("gptq", "awq", "auto-round", "gguf")  # whose scales of integer codes are float16
_WIDER = (torch.bfloat16, torch.float32)


def check_scales(checkpoint: Checkpoint, modules: Collection[str], target: str) -> None:
    """LossError naming the first scale of `modules`, which have integer codes, that `target` does not hold exactly."""
    if checkpoint.format is None or target not in FLOAT16_TARGETS:
        return
    chosen = set(modules)
    for name, info in checkpoint.tensors.items():
        if info.dtype not in _WIDER or suffix(name) in COMPANIONS:
            continue
        for module, part, _ in checkpoint.format.locate(name, TensorHeader(info.dtype, info.shape)):
            scales = checkpoint.format.scales_in(part, checkpoint.read(name)) if module in chosen else None
            if scales is None:
                continue
            check_codes(checkpoint, module, [scales])
            try:
                writing.exact_cast(target, module, "scales", scales, torch.float16)
            except UsageError as error:
                raise LossError(error.message) from error
