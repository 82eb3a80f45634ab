"""Decoder families described as data, and one forward for all of them."""
