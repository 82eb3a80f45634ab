"""AQLM: weights as scaled sums of codebook vectors, chosen for the least error of a layer's output."""
