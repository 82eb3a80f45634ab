"""vLLM's CPU build loads a checkpoint and gives the log-probabilities of every next token.

It does not show weights: it lays them out anew for its kernels when it loads them.
"""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from exchange import serve
from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def load(request: dict[str, Any]) -> Any:
    llm = LLM(
        request["checkpoint"],
        dtype=request["settings"].get("dtype", "bfloat16"),
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
        max_logprobs=-1,
        enable_prefix_caching=False,
    )
    rows = request["token_ids"].tolist()
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params)
    probabilities = [[by_token(position) for position in output.prompt_logprobs[1:]] for output in outputs]
    return {}, torch.tensor(probabilities), {"log_probabilities": True}


def by_token(position: dict[int, Any]) -> list[float]:
    return [position[token].logprob for token in range(len(position))]


if __name__ == "__main__":
    serve(load)
