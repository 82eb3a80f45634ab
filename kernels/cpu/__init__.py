"""Compiled C++ kernels for x86-64 CPUs, behind a C ABI."""
