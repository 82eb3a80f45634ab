"""The integer kernels that are compiled ahead."""

from aphroquant.kernels.cuda.integer.batch_variants import BATCH_VARIANTS
from aphroquant.kernels.cuda.integer.decode_variants import DECODE_VARIANTS

VARIANTS = (*BATCH_VARIANTS, *DECODE_VARIANTS)
