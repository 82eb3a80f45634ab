"""Tables of codes as the CUDA kernels hold them: in the 16-bit type of the inputs.

A table of float32 numbers (NF4) loses precision there: up to 2**-9 of each number in bf16, as a dequantized weight does
that is rounded to bf16. But a table may be multiplied by any factor, whose inverse then multiplies the outputs in
float32. Of all factors in [1, 2), the one is taken whose products lie closest to numbers of the type: that leaves about
half of NF4's error, and none of FP4's. Tables of small integers and of halves are exact as they are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aphroquant.schemes.lookup import TABLES, TableName

TABLE_BYTES = 256 * 32 * 4  # of shared memory: code_table.cuh
_TRIALS = 1 << 14


@cache
def table_factor(table: TableName, dtype: torch.dtype) -> float:
    """What the numbers of the table are multiplied with before they are rounded to `dtype`."""
    values = _values(table)
    factors = 1 + torch.arange(_TRIALS, dtype=torch.float64) / _TRIALS
    products = values * factors[:, None]
    errors = ((products.to(dtype).double() - products) / factors[:, None]).square().sum(1)
    return float(factors[int(errors.argmin())])


def rounded_table(table: TableName, dtype: torch.dtype) -> Tensor:
    """The table [16] as the kernels have it: times `table_factor`, in `dtype`."""
    return (_values(table) * table_factor(table, dtype)).to(dtype)


def table_macro(table: TableName, dtype: torch.dtype) -> str:
    """The macro CODE_TABLE of code_table.cuh."""
    bits = rounded_table(table, dtype).view(torch.int16).int() & 0xFFFF
    return ",".join(str(value) for value in bits.tolist())


def _values(table: TableName) -> Tensor:
    return torch.tensor(TABLES[table], dtype=torch.float32).double()
