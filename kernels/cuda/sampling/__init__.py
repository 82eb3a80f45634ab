"""Choosing tokens on a GPU."""
