"""From a source checkpoint to a quantized one, block by block."""

from aphroquant.conversion.progress import Progress
from aphroquant.conversion.result import ConversionResult
from aphroquant.conversion.run import convert

__all__ = ["ConversionResult", "Progress", "convert"]
