"""The AQLM kernels' self-tests."""

from __future__ import annotations

from aphroquant.kernels.cuda.aqlm.linear import CudaAdditiveLinear
from aphroquant.kernels.cuda.linear_self_test import linear_self_tests
from aphroquant.schemes import AdditiveScheme

SELF_TESTS = linear_self_tests(
    CudaAdditiveLinear,
    (AdditiveScheme(2, 8), AdditiveScheme(1, 16), AdditiveScheme(3, 6, in_group=4)),
    (1, 5, 40, 600),  # tables or entries for decoding, entries for batches, dense rows for prompts
    in_features=1040,
)
