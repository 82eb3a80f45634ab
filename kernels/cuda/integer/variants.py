"""The integer kernels that are compiled ahead."""

from aphroquant.kernels.cuda.integer.batch_variants import BATCH_VARIANTS

VARIANTS = BATCH_VARIANTS
