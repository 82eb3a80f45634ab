"""Schemes: what numbers a quantized weight is made of, with nothing said about bytes on disk or devices.

Formats read tensors into a `QuantizedWeight` and write one back; solvers make one from a dense weight; kernels prepare
one for a device. They meet only here.

Notation: a linear layer has a weight W [N, K] (N = out_features, K = in_features) and computes y = x @ W.T.
Codes are unsigned and zero points true (nothing is offset by one), whatever a file stores.
"""

from aphroquant.schemes.activation import ActivationScheme
from aphroquant.schemes.additive import AdditiveScheme
from aphroquant.schemes.affine import AffineScheme
from aphroquant.schemes.dense import DenseScheme
from aphroquant.schemes.float8 import FloatScheme, Granularity
from aphroquant.schemes.integer import IntegerScheme
from aphroquant.schemes.kquant import KQuantScheme
from aphroquant.schemes.lookup import TABLES, LookupScheme, ScaleKind, TableName
from aphroquant.schemes.trellis import CodebookName, TrellisScheme
from aphroquant.schemes.weight import QuantizedWeight, Scheme

__all__ = [
    "TABLES",
    "ActivationScheme",
    "AdditiveScheme",
    "AffineScheme",
    "CodebookName",
    "DenseScheme",
    "FloatScheme",
    "Granularity",
    "IntegerScheme",
    "KQuantScheme",
    "LookupScheme",
    "QuantizedWeight",
    "ScaleKind",
    "Scheme",
    "TableName",
    "TrellisScheme",
]
