"""Whether a model can be distilled in the memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from aphroquant.calibration.refine import BATCH_WINDOWS
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion.plan import ConversionPlan
from aphroquant.conversion.targets import TargetScheme
from aphroquant.schemes import AdditiveScheme, IntegerScheme

_COPIES_OF_A_BLOCK = 3  # its dense weights, their gradients, and one of them on its way
_COPIES_OF_INNER = 8  # of what a block makes of its input and keeps for the way back, in hidden and inner sizes
_ATTENTION_COPIES = 3  # of [heads, S, S]
_NUMBERS_A_GROUP = 7  # scale, factor, two of Adam's, zero point, and one each on their way, float32
_LOGITS_BYTES = 2 << 30


def refusal(plan: ConversionPlan, window_len: int, device: torch.device) -> str | None:
    """Why there is no room to distill; None if there is."""
    needed, free = distillation_bytes(plan, window_len), free_memory(device)
    if needed <= free:
        return None
    where = "the GPU" if device.type == "cuda" else "memory"
    return f"distillation is left out: it needs {size_text(needed)} at once, and {where} has {size_text(free)} free"


def distillation_bytes(plan: ConversionPlan, window_len: int) -> int:
    """About what a distillation holds at once: codes, scales, head, states between blocks, and one block's work."""
    spec = plan.spec
    weights = sum(rows * columns for rows, columns in plan.modules.values())
    tokens = BATCH_WINDOWS * window_len
    states = tokens * spec.hidden_size * (spec.num_layers + 2) * 4
    vocabulary = 2 * spec.vocab_size * spec.hidden_size * 4
    block = weights // spec.num_layers * 4 * _COPIES_OF_A_BLOCK
    inner = tokens * (spec.hidden_size + spec.intermediate_size) * 4 * _COPIES_OF_INNER
    attention = BATCH_WINDOWS * spec.num_heads * window_len**2 * 4 * _ATTENTION_COPIES
    trained = sum(_trained_bytes(plan.schemes[module], *shape) for module, shape in plan.modules.items())
    return trained + states + vocabulary + block + inner + attention + _LOGITS_BYTES


def _trained_bytes(scheme: TargetScheme, rows: int, columns: int) -> int:
    """Of what is kept of one weight between its steps."""
    if isinstance(scheme, IntegerScheme):
        return rows * columns + rows * scheme.num_groups(columns) * 4 * _NUMBERS_A_GROUP
    if not isinstance(scheme, AdditiveScheme):
        return rows * columns  # not trained, but kept
    codes = rows * columns // scheme.in_group * scheme.num_codebooks
    entries: int = scheme.num_codebooks * 2**scheme.code_bits * scheme.in_group
    code_bytes: int = scheme.dtypes()["codes"].itemsize + 8  # and that of their order, int64
    return codes * code_bytes + entries * 4 * _NUMBERS_A_GROUP


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
