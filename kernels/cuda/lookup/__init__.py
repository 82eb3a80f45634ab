"""Weights whose codes stand for the numbers of a table, and GGUF's super-blocks, for the kernels of integer weights."""
