"""Plain torch kernels: slow, simple, and the definition of correct."""
