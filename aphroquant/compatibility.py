"""Which engine loads which format with which schemes, and how that is known.

Evidence is a row of the table in README.md, which ./scripts/interop writes from what the libraries did, or else the
engine's own documentation, which is worth less: nobody here has tried it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_GROUPS = "(g32|g64|g128|channel)"  # what the engines' kernels know
_VLLM_DOCS = "https://docs.vllm.ai/en/latest/features/quantization/"
_SGLANG_DOCS = "https://docs.sglang.io/advanced_features/quantization.html"
_LLAMA_DOCS = "https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md"
ENGINES = ("aphroquant", "transformers", "vllm", "sglang", "llama.cpp")


class Row(NamedTuple):
    """A row of the table in README.md, without the library's release."""

    library: str
    case: str


class Support(NamedTuple):
    """`engine` loads layers of `format` whose scheme, in words, fits `schemes` (a regular expression), or does not.

    `needs` is what has to be there beside the engine.
    """

    engine: str
    format: str
    schemes: str
    evidence: Row | str  # a row, or the address of documentation
    loads: bool = True
    needs: str = ""

    @property
    def is_tried(self) -> bool:
        return isinstance(self.evidence, Row)

    @property
    def is_documented(self) -> bool:
        """Whether all that is known of it is what the engine's makers say."""
        return not self.is_tried and bool(self.evidence)


def _tried(engine: str, format: str, schemes: str, case: str, *, library: str = "", needs: str = "") -> Support:
    return Support(engine, format, schemes, Row(library or engine, case), needs=needs)


def _refused(engine: str, format: str, schemes: str, case: str) -> Support:
    return Support(engine, format, schemes, Row(engine, case), loads=False)


_CT = "the package compressed-tensors"
_GPTQMODEL = "the package gptqmodel"
_BNB = "the package bitsandbytes"
_AQLM = "the package aqlm"
_GPU = "a GPU"
_GPU_FP8 = "a GPU with FP8 (Ada, Hopper or newer)"

TABLE: tuple[Support, ...] = (
    _tried("transformers", "bitsandbytes", r"nf4 g\d+( flat)?", "bitsandbytes NF4", needs=_BNB),
    _tried("transformers", "bitsandbytes", r"nf4 g\d+ double-quantized( flat)?", "bitsandbytes NF4, nested",
           needs=_BNB),
    _tried("transformers", "bitsandbytes", r"fp4 g\d+( flat)?", "bitsandbytes FP4", needs=_BNB),
    _tried("transformers", "bitsandbytes", r"int8 sym channel( x .*)?", "bitsandbytes LLM.int8", needs=_BNB),
    _tried("transformers", "compressed-tensors", rf"int4 sym {_GROUPS}", "compressed-tensors W4A16, kept packed",
           needs=_CT),
    _tried("transformers", "compressed-tensors", rf"int8 sym {_GROUPS}", "compressed-tensors W8A16", needs=_CT),
    _tried("transformers", "compressed-tensors", r"int8 sym channel x int8 inputs", "compressed-tensors W8A8 int8",
           needs=_CT),
    _tried("transformers", "compressed-tensors", r"fp8 per channel x fp8 dynamic inputs",
           "compressed-tensors FP8 dynamic", needs=_CT),
    _tried("transformers", "compressed-tensors", r"fp8 per tensor x fp8 static inputs",
           "compressed-tensors FP8 static", needs=_CT),
    _tried("transformers", "compressed-tensors", r"fp8 block 128x128 x fp8 dynamic inputs",
           "compressed-tensors FP8 block", needs=_CT),
    _tried("transformers", "fp8", r"fp8 block 128x128 x fp8 dynamic inputs", "FP8 fine-grained"),
    _tried("transformers", "aqlm", r"additive 1x16 g8", "AQLM 1x16", needs=_AQLM),
    _tried("transformers", "aqlm", r"additive 2x8 g8", "AQLM 2x8", needs=_AQLM),
    _tried("transformers", "gguf", r"Q4_K_M", "GGUF Q4_K_M", needs="the package gguf"),
    _tried("transformers", "gptq", rf"int4 a?sym {_GROUPS}", "GPTQ 4 bit", needs=_GPTQMODEL),
    _tried("transformers", "awq", rf"int4 asym {_GROUPS}", "AWQ", needs=_GPTQMODEL),
    _tried("vllm", "gptq", rf"int4 sym {_GROUPS}", "GPTQ 4 bit"),
    _refused("vllm", "gptq", r"int4 asym .*", "GPTQ 4 bit, zero points"),
    _tried("vllm", "awq", rf"int4 asym {_GROUPS}", "AWQ"),
    _tried("vllm", "compressed-tensors", rf"int4 sym {_GROUPS}", "compressed-tensors W4A16"),
    _tried("vllm", "compressed-tensors", r"int8 sym channel x int8 inputs", "compressed-tensors W8A8 int8"),
    Support("vllm", "gptq", rf"int8 sym {_GROUPS}", _VLLM_DOCS + "gptqmodel.html", needs=_GPU),
    Support("vllm", "fp8", r"fp8 (per tensor|block 128x128) x fp8 (dynamic|static) inputs", _VLLM_DOCS + "fp8.html",
            needs=_GPU_FP8),
    Support("vllm", "compressed-tensors", r"fp8 per channel x fp8 dynamic inputs", _VLLM_DOCS + "fp8.html",
            needs=_GPU_FP8),
    Support("vllm", "compressed-tensors", r"fp8 per tensor x fp8 static inputs", _VLLM_DOCS + "fp8.html",
            needs=_GPU_FP8),
    Support("vllm", "modelopt", r"fp8 per tensor x fp8 static inputs", _VLLM_DOCS + "modelopt.html", needs=_GPU_FP8),
    Support("vllm", "auto-round", rf"int4 sym {_GROUPS}", _VLLM_DOCS + "inc.html", needs=_GPU),
    Support("sglang", "gptq", rf"int[48] sym {_GROUPS}", _SGLANG_DOCS, needs=_GPU),
    Support("sglang", "awq", rf"int4 asym {_GROUPS}", _SGLANG_DOCS, needs=_GPU),
    Support("sglang", "auto-round", rf"int4 sym {_GROUPS}", _SGLANG_DOCS, needs=_GPU),
    Support("sglang", "compressed-tensors", r"int8 sym channel x int8 inputs", _SGLANG_DOCS, needs=_GPU),
    Support("sglang", "compressed-tensors", r"fp8 per channel x fp8 dynamic inputs", _SGLANG_DOCS, needs=_GPU_FP8),
    Support("sglang", "fp8", r"fp8 (per tensor|block 128x128) x fp8 (dynamic|static) inputs", _SGLANG_DOCS,
            needs=_GPU_FP8),
    Support("sglang", "modelopt", r"fp8 per tensor x fp8 static inputs", _SGLANG_DOCS, needs=_GPU_FP8),
    _tried("llama.cpp", "gguf", r"Q4_0", "GGUF Q4_0", library="llama-cpp-python"),
    _tried("llama.cpp", "gguf", r"Q8_0", "GGUF Q8_0", library="llama-cpp-python"),
    _tried("llama.cpp", "gguf", r"Q4_K_M", "GGUF Q4_K_M", library="llama-cpp-python"),
    _tried("llama.cpp", "gguf", r"Q6_K", "GGUF Q6_K", library="llama-cpp-python"),
    Support("llama.cpp", "gguf", r"Q4_1|Q5_[01]|Q[2-6]_K(_[SML])?|IQ\w+|MXFP4|F16|BF16|F32", _LLAMA_DOCS),
)  # fmt: skip


def support(format: str, schemes: Iterable[str]) -> list[Support]:
    """The engines that load every one of these schemes, given in words, in the order of ENGINES.

    Of several ways to know it, the one that was tried; what was tried without success is left out unless the engine's
    documentation says that other hardware can do it.
    """
    wanted = list(schemes)
    found = [entry for engine in ENGINES[1:] if (entry := _best(engine, format, wanted)) is not None]
    return [Support("aphroquant", format, ".*", "", needs=""), *found]


def _best(engine: str, format: str, schemes: list[str]) -> Support | None:
    """The weakest of what is known of each scheme; None if the engine does not load one of them."""
    found = []
    for scheme in schemes:
        entries = [entry for entry in TABLE if entry[:2] == (engine, format) and re.fullmatch(entry.schemes, scheme)]
        loading = [entry for entry in entries if entry.loads]
        if not loading:
            return None
        found.append(next((entry for entry in loading if entry.is_tried), loading[0]))
    return next((entry for entry in found if not entry.is_tried), found[0] if found else None)
