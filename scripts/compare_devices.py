#!/usr/bin/env python3
"""Greedy answers of one model on the GPU and on the CPU, and where they part, how close the choice was.

    scripts/compare_devices.py model.gguf [--tokens 64] [--dtype float16]

Exit code 1 if answers part where the CPU's two likeliest tokens are further apart than --gap nats.
"""

from __future__ import annotations

import argparse
import json
import sys

from aphroquant import LLM, SamplingParams
from aphroquant.engine.llm import Generation

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the difference between a virus and a bacterium?\nA:",
    "In 1969, the first human landed on",
    "The quick brown fox",
    "Water boils at 100 degrees Celsius because",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="of activations on the GPU")
    parser.add_argument("--gap", type=float, default=0.05, help="nats below which a choice counts as a tie")
    options = parser.parse_args()
    host = answers(options.model, options.tokens, device="cpu", activations="float", kv_cache_dtype="float32")
    gpu = answers(options.model, options.tokens, device="cuda", dtype=options.dtype)
    rows = [compare(prompt, *pair) for prompt, *pair in zip(PROMPTS, host, gpu, strict=True)]
    for row in rows:
        print(f"{row['equal']:4} equal tokens, gap {row['gap']}: {row['prompt']!r}")
    apart = [row for row in rows if row["gap"] is not None and row["gap"] > options.gap]
    print(json.dumps({"prompts": len(rows), "identical": sum(row["gap"] is None for row in rows), "apart": len(apart)}))
    return 1 if apart else 0


def answers(model: str, tokens: int, **settings: str) -> list[Generation]:
    llm = LLM(model, max_num_seqs=len(PROMPTS), max_model_len=512, **settings)
    wants_logprobs = 2 if settings["device"] == "cpu" else None
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=wants_logprobs)
    return llm.generate(PROMPTS, sampling)


def compare(prompt: str, host: Generation, gpu: Generation) -> dict[str, object]:
    """Tokens before the answers part, and there the CPU's distance between its choice and the GPU's, or its second."""
    pairs = zip(host.token_ids, gpu.token_ids, strict=True)
    equal = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(host.token_ids))
    gap = None
    if equal < len(host.token_ids):
        assert host.logprobs is not None
        top = host.logprobs[equal].top
        gap = round(top[0][1] - top[1][1], 5)
        if top[1][0] != gpu.token_ids[equal]:
            gap = float("inf")  # the GPU's choice is not even the CPU's second
    return {"prompt": prompt, "equal": equal, "gap": gap}


if __name__ == "__main__":
    sys.exit(main())
