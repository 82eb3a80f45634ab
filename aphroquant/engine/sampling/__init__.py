"""Samplers: one class each, made per request, applied to that request's row of logits and to no other.

A row goes through adjusters (penalties, bans), truncations (top-k, temperature, min-p, top-p) and one draw with the
request's own generator. Rows never meet, so a request's tokens depend on its logits, parameters and seed alone.
"""

from aphroquant.engine.sampling.logprobs import RankedLogprobs
from aphroquant.engine.sampling.sampler import RequestSampler, Sampled, sample

__all__ = ["RankedLogprobs", "RequestSampler", "Sampled", "sample"]
