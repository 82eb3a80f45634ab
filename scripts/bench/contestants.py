"""One contestant of bench_cpu: loads its model, then measures once for every line on stdin.

    contestants.py NAME MODEL PROMPT_TOKENS DECODE_TOKENS THREADS

Each answer is a JSON line: first the versions, then {"prompt": tokens/s, "decode": tokens/s}. The prompt is timed up to
the first new token, the decoding over the tokens after it, one at a time and greedily. llama.cpp lives in an
environment of its own, so nothing but the standard library is imported at the top.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Steps = Iterator[None]  # the first step ends the prompt, each later one decodes a token
FIRST_TOKEN = 1000  # of the prompt: ordinary tokens that follow one another


def main() -> None:
    name, model, *sizes = sys.argv[1:]
    prompt_tokens, decode_tokens, threads = map(int, sizes)
    prompt = [FIRST_TOKEN + i for i in range(prompt_tokens)]
    start = LOADERS[name](Path(model), prompt_tokens + decode_tokens + 1, threads)
    measure(start, prompt, min(decode_tokens, 4))  # warm up
    say({package: importlib.metadata.version(package) for package in PACKAGES[name]})
    for _ in sys.stdin:
        say(measure(start, prompt, decode_tokens))


def measure(start: Callable[[list[int]], Steps], prompt: list[int], decode_tokens: int) -> dict[str, float]:
    began = time.perf_counter()
    steps = start(prompt)
    next(steps)
    first = time.perf_counter()
    for _ in range(decode_tokens):
        next(steps)
    last = time.perf_counter()
    steps.close()  # type: ignore[attr-defined]  # a generator
    return {"prompt": len(prompt) / (first - began), "decode": decode_tokens / (last - first)}


def load_engine(model: Path, max_len: int, threads: int) -> Callable[[list[int]], Steps]:
    """The whole engine: scheduling, sampling, detokenizing."""
    from aphroquant.engine.engine import Engine
    from aphroquant.engine.types import EngineConfig, GenerationRequest, SamplingParams

    config = EngineConfig(
        model=str(model), max_model_len=max_len + 1, enable_prefix_caching=False, num_threads=threads, backend="cpu"
    )
    engine = Engine(config)

    def start(prompt: list[int]) -> Steps:
        sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_len - len(prompt))
        engine.add_request(GenerationRequest(request_id="bench", prompt_token_ids=prompt, sampling=sampling))
        try:
            while True:
                while not any(delta.token_ids for delta in engine.step()):
                    pass
                yield
        finally:
            engine.abort("bench")
            while engine.has_unfinished():
                engine.step()

    return start


def load_forward(model: Path, max_len: int, threads: int) -> Callable[[list[int]], Steps]:
    """The compiled forward alone."""
    import torch

    from aphroquant.checkpoint import open_checkpoint
    from aphroquant.engine.batch import ForwardBatch
    from aphroquant.engine.kv_cache import KVCache, KVScheme
    from aphroquant.kernels.cpu.decoder import NativeDecoder

    checkpoint = open_checkpoint(model)
    num_blocks = -(-max_len // 16)
    cache = KVCache(checkpoint.spec, KVScheme.named("bfloat16"), num_blocks, 16)
    decoder = NativeDecoder(checkpoint, cache, num_threads=threads)
    table = torch.arange(num_blocks, dtype=torch.int32)[None]

    def forward(tokens: list[int], first: int) -> int:
        count = len(tokens)
        positions = torch.arange(first, first + count, dtype=torch.int32)
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens, dtype=torch.int32),
            positions=positions,
            slot_mapping=positions.long(),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([first + count], dtype=torch.int32),
            block_tables=table,
            logits_rows=torch.tensor([count - 1], dtype=torch.int32),
        )
        return int(decoder.forward(batch).argmax())

    def start(prompt: list[int]) -> Steps:
        token, position = forward(prompt, 0), len(prompt)
        while True:
            yield
            token = forward([token], position)
            position += 1

    return start


def load_transformers(dtype: str) -> Callable[[Path, int, int], Callable[[list[int]], Steps]]:
    """The dequantized weights as an ordinary dense model in transformers."""

    def load(model: Path, _: int, threads: int) -> Callable[[list[int]], Steps]:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from aphroquant.checkpoint import open_checkpoint

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        checkpoint = open_checkpoint(model)
        config = AutoConfig.for_model(**checkpoint.config)
        network = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
        missing, unexpected = network.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
        network.tie_weights()

        def start(prompt: list[int]) -> Steps:
            tokens, past = torch.tensor([prompt]), None
            while True:
                result = network(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
                tokens, past = result.logits[:, -1].argmax(-1, keepdim=True), result.past_key_values
                yield

        return start

    return load


def load_llama_cpp(model: Path, max_len: int, threads: int) -> Callable[[list[int]], Steps]:
    from llama_cpp import Llama

    llama = Llama(str(model), n_ctx=max_len + 1, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def start(prompt: list[int]) -> Steps:
        llama.reset()
        tokens = prompt
        while True:
            llama.eval(tokens)
            tokens = [llama.sample(temp=0.0)]
            yield

    return start


def say(value: dict[str, object] | dict[str, str] | dict[str, float]) -> None:
    print(json.dumps(value), flush=True)


LOADERS: dict[str, Callable[[Path, int, int], Callable[[list[int]], Steps]]] = {
    "aphroquant": load_engine,
    "aphroquant forward": load_forward,
    "transformers float32": load_transformers("float32"),
    "transformers bfloat16": load_transformers("bfloat16"),
    "llama.cpp": load_llama_cpp,
}
PACKAGES = {
    "aphroquant": ["aphroquant", "torch"],
    "aphroquant forward": ["aphroquant", "torch"],
    "transformers float32": ["transformers", "torch"],
    "transformers bfloat16": ["transformers", "torch"],
    "llama.cpp": ["llama_cpp_python"],
}

if __name__ == "__main__":
    main()
