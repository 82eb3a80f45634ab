"""What crosses the engine's border: requests in, deltas out. msgspec structs, so that they travel as msgpack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from aphroquant.errors import RequestError, UsageError

FinishReason = Literal["stop", "length", "abort", "error"]


# An error of a request's delta, and what to do about it.
NOT_NUMBERS = "the model's logits are not numbers (NaN or infinite)"
NOT_NUMBERS_HINT = (
    "aphroquant inspect --verify tells whether its weights are damaged; sound ones may overflow in 16 bits on a GPU: "
    "try --device cpu"
)

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_THREADS = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request samples. Field names and meanings follow the field's standard; defaults change nothing.

    temperature 0 is greedy; top_k 0 or -1, top_p 1, min_p 0 are off. `repetition_penalty` looks at prompt and output,
    `frequency_penalty` and `presence_penalty` at the output alone. `logprobs` is the number of alternatives
    reported beside each chosen token (None: no logprobs), taken from the raw model distribution.
    """

    n: int = 1
    max_tokens: int | None = None  # None: as many as the context holds
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None

    def validate(self) -> None:
        """Raise RequestError naming the first field of a wrong type or outside its range."""
        _check_types(self)
        _require(1 <= self.n <= MAX_N, "n", self.n, f"between 1 and {MAX_N}")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens", self.min_tokens, "at most max_tokens",
        )  # fmt: skip
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "between 0 and 100")
        _require(self.top_k >= -1, "top_k", self.top_k, "-1 or 0 (off), or at least 1")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(
            0.01 <= self.repetition_penalty <= 100,  # beyond, logits leave the range of float32
            "repetition_penalty", self.repetition_penalty, "between 0.01 and 100",
        )  # fmt: skip
        for name in ("frequency_penalty", "presence_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "between -2 and 2")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        _require(all(self.stop), "stop", "''", "non-empty strings")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs", self.logprobs, f"between 0 and {MAX_LOGPROBS}",
        )  # fmt: skip


def _check_types(params: SamplingParams) -> None:
    """A text given as `stop` would otherwise be read as its letters, and half a token be rounded."""
    try:
        msgspec.convert(msgspec.structs.asdict(params), SamplingParams)
    except msgspec.ValidationError as error:
        rule, _, path = str(error).replace("`", "").partition(" - at $.")
        param = path.partition("[")[0]
        raise RequestError(f"{path}: {rule[:1].lower()}{rule[1:]}", param=param) from None


def _require(holds: bool, param: str, value: object, rule: str) -> None:
    if not holds:  # NaN fails every comparison, and so every rule
        raise RequestError(f"{param} = {value} must be {rule}", param=param)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. With sampling.n > 1 the engine runs n choices that share the prompt's KV blocks."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""  # prefixes are shared only between requests of the same salt


class TokenLogprobs(msgspec.Struct, frozen=True):
    """The chosen token and its `top` alternatives (best first) as (token id, logprob, text)."""

    chosen: tuple[int, float, str]
    top: list[tuple[int, float, str]] = []


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """News of one choice of one request. `text` never ends inside a character or a possible stop string.

    The last delta of a choice has a finish_reason; with "error", `error` says why. `num_cached_tokens` counts prompt
    tokens taken from the prefix cache.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A look at the engine. The last group counts since its start; prefix counts are prompt tokens."""

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0  # of requests accepted
    generation_tokens: int = 0
    preemptions: int = 0


_CHOICES = {
    "backend": ("auto", "reference", "cpu", "cuda"),
    "activations": ("int8", "float"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is set up. Memory in bytes, lengths in tokens."""

    model: str
    # auto (the model's dtype) | float32 | bfloat16 | float16 | fp8_e4m3 | int8_per_token_head
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None  # None: from kv_cache_memory
    kv_cache_memory: int | None = None  # None: a share of free memory
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None  # None: what suits the device
    enable_prefix_caching: bool = True
    backend: str = "auto"  # auto | reference | cpu | cuda
    device: str = "auto"  # auto (a GPU if one can be used) | cpu | cuda
    dtype: str = "auto"  # activations on a GPU: auto (the model's) | bfloat16 | float16
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory that weights, activations and KV cache may take
    activations: str = "int8"  # inputs of integer-quantized linears on the CPU: int8 (fast) | float (exact)
    num_threads: int | None = None

    def __post_init__(self) -> None:
        counts = ("block_size", "num_kv_blocks", "kv_cache_memory", "max_num_seqs", "max_num_batched_tokens")
        for name in (*counts, "num_threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} = {value!r} must be a whole number, at least 1")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:  # OpenMP crashes when it cannot start them
            raise UsageError(f"num_threads = {self.num_threads} must be at most {MAX_THREADS}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(known)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization = {self.gpu_memory_utilization!r} must be above 0 and at most 1")
        if self.device == "cuda" and self.backend in ("reference", "cpu"):
            raise UsageError(f"backend = {self.backend!r} runs on the CPU, and device is 'cuda'", hint="leave one out")
        if self.device == "cpu" and self.backend == "cuda":
            raise UsageError("backend = 'cuda' runs on a GPU, and device is 'cpu'", hint="leave one out")
