"""From a source checkpoint to a quantized one, block by block."""
