"""AQLM weights: sums of codebook vectors, multiplied by tables, by gathered entries, or dequantized."""
