"""Choosing how many bits each layer gets, for an average of bits or a size of the whole."""
