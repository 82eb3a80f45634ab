"""The integer kernels' self-tests."""

from __future__ import annotations

from aphroquant.kernels.cuda.integer.linear import CudaIntegerLinear
from aphroquant.kernels.cuda.linear_self_test import linear_self_tests
from aphroquant.schemes import IntegerScheme

SELF_TESTS = linear_self_tests(
    CudaIntegerLinear,
    (IntegerScheme(4, 128, True), IntegerScheme(4, 32, False, act_order=True), IntegerScheme(8, None, True)),
    (1, 40, 600),  # for decoding, batches, prompts
)
