"""Attention over the paged KV cache on a GPU: one new token a sequence, and several."""
