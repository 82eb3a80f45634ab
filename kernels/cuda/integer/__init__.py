"""Linear layers with integer weights on CUDA: one packed layout, and the kernels that read it."""
