"""The self-tests of the kernels for lookup weights and super-blocks."""

from __future__ import annotations

from aphroquant.kernels.cuda.linear_self_test import linear_self_tests
from aphroquant.kernels.cuda.lookup.linear import CudaLookupLinear
from aphroquant.schemes import KQuantScheme, LookupScheme

SELF_TESTS = linear_self_tests(
    CudaLookupLinear,
    (
        LookupScheme("nf4", 64, "nested", flattened=True),
        LookupScheme("fp4", 64, "float"),
        LookupScheme("e2m1", 32, "e8m0"),
        LookupScheme("e2m1", 16, "e4m3"),
        KQuantScheme("q4_k"),
        KQuantScheme("q6_k"),
    ),
    (1, 40, 600),  # for decoding, batches, prompts
)
