"""Timing linear layers of real models beside what the machine allows: what `aphroquant bench kernels` does."""
