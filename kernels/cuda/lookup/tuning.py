"""What scripts/tune_kernels tries for lookup weights and super-blocks: the settings of the integer kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from aphroquant.kernels.benchmark.layer_shapes import layer_shapes
from aphroquant.kernels.cuda.integer import tuning
from aphroquant.kernels.cuda.integer.measured import LOOKUP_DECODE, LOOKUP_WGMMA
from aphroquant.kernels.cuda.lookup.kinds import schemes_by_kind
from aphroquant.kernels.cuda.tuning import Problem

_MODEL = "llama-3-8b"
_DECODE_TOKENS = (1, 16)
_BATCH_TOKENS = (16, 64, 256, 1024, 4096)


def _problems(tokens: Sequence[int]) -> Iterator[Problem]:
    for kind in schemes_by_kind():
        for shape in layer_shapes(_MODEL):
            for count in tokens:
                yield Problem(kind, shape.out_features, shape.in_features, count)


_DECODE, _WGMMA = tuning.TUNABLES
TUNABLES = (
    replace(_DECODE, name=LOOKUP_DECODE, problems=lambda: _problems(_DECODE_TOKENS)),
    replace(_WGMMA, name=LOOKUP_WGMMA, problems=lambda: _problems(_BATCH_TOKENS)),
)
