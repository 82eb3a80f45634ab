"""Small kernels that show whether launching works at all: when these fail, no kernel's arithmetic is at fault."""
