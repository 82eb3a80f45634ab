"""The page formats/README.md from the pairs that were tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from aphroquant.conversion.gguf_types import BY_BITS, DEFAULT, MIXES, PURE
from aphroquant.conversion.targets import quantizable_targets, scheme_names
from conversion_pairs.pairs import IMPOSSIBLE, LOSSLESS, REQUANTIZE, ROUNDED, TARGETS, Pair
from conversion_pairs.shapes import Sizes

SIGNS = {LOSSLESS: "**=**", ROUNDED: "**≈**", REQUANTIZE: "q", IMPOSSIBLE: "–"}
_HEAD = """\
# Checkpoint formats

Written by `./scripts/pairs.py`, which tries every pair on tiny checkpoints; do not edit it.

`aphroquant convert SOURCE --to FORMAT --out PATH` reads any of these formats and writes any other. A quantized source
is taken over **without loss** where the target can hold its numbers: each layer is read back from what was written and
compared bit for bit, after dequantization, before the output gets its name. Where the target cannot hold them,
`convert` refuses with the reason and exit code 2, unless `--requantize` allows it to dequantize the layers and quantize
them anew. Its output, `aphroquant.json` beside it and `--json` say which of the two it was.

Everything else is carried over byte for byte: norms, embeddings, routers, MTP heads, vision towers, scales of a KV
cache (under the names that the target's readers look for), tokenizer, chat templates and generation settings. An
embedding or head that only a GGUF source quantizes becomes float32, which holds every bit; so does a quantized head in
awq, whose readers expect a dense one. A GGUF file has no place for
tensors that llama.cpp's model has not, and for cache scales: they are left out with a warning or a note.
"""
_PAIRS_HEAD = """\
## Which pairs are lossless

{equal} lossless · {rounded} lossless but for a rounding · {requantize} needs `--requantize` · {impossible} not possible

The rounding is that of NVFP4's global scale, which one format multiplies with and another divides by: its reciprocal
becomes a float32, which changes each weight by 2**-24 at most; all codes and block scales stay the same bits.

The sources are models of one block, whose layers have 256 input columns. GGUF files of the type F16, BF16 or
F32 are dense. Scales that float16 cannot hold make a pair that is lossless here need `--requantize`: gptq, awq,
auto-round and gguf have float16 scales. EXL3 checkpoints are read, and need `--requantize` for every target.
"""
_SIZES_HEAD = """\
## Which shapes a layer may have

What a layer's sizes must be multiples of; a group's size comes on top, of which in_features must be a multiple. A layer
of another shape stays dense with `--ignore`, or goes to compressed-tensors. The groups of hqq run through the whole
matrix: the number of its weights must be a multiple of one (3 and 8 bits), two (4 bits) or four of them (2 bits).
"""
_SCHEMES_HEAD = """\
## What weights can be quantized to

`--scheme` of `convert`, by target. Others ({others}) only take over numbers that the source already has.
"""
_MIXES = """\
For gguf the default is `{default}`, and `--bits` means
{bits}.
A name of a type gives it to all layers; {mixes} are llama.cpp's mixes:
attn_v and ffn_down have Q6_K in the first and the last eighth of the blocks and in every third between them, all other
layers the type that the name begins with. Whatever the name, the matrix that makes the logits (the head, or an
embedding that is tied to it) has at least Q6_K. Rows that are no multiple of 256 get llama.cpp's stand-ins: Q5_0 for
Q4_K, Q5_1 for Q5_K, Q8_0 for Q6_K, IQ4_NL for Q2_K and Q3_K. The encoders search for the least squared error; with
`--calibration FILE` they weigh the error of each column by the mean square of the layer's inputs on that text (an
importance matrix).
"""


def render(pairs: Sequence[Pair], sizes: Sequence[Sizes]) -> str:
    """The whole page."""
    parts = [_HEAD, _PAIRS_HEAD.format(**{name: SIGNS[v] for name, v in _SIGN_NAMES.items()}), _table(pairs)]
    return "\n".join(
        [*parts, _reasons(pairs), _SIZES_HEAD, _sizes(sizes), _SCHEMES_HEAD.format(others=_others()), _schemes()]
    )


_SIGN_NAMES = {"equal": LOSSLESS, "rounded": ROUNDED, "requantize": REQUANTIZE, "impossible": IMPOSSIBLE}


def _table(pairs: Sequence[Pair]) -> str:
    """One row a source, one column a target."""
    lines = ["| from | numbers | " + " | ".join(TARGETS) + " |", "|---|---|" + ":-:|" * len(TARGETS)]
    verdicts = {(pair.source, pair.target): SIGNS[pair.verdict] for pair in pairs}
    for source in dict.fromkeys(pair.source for pair in pairs):
        signs = " | ".join(verdicts[source, target] for target in TARGETS)
        lines.append(f"| {source.format} | {source.name} | {signs} |")
    return "\n".join(lines) + "\n"


def _reasons(pairs: Iterable[Pair]) -> str:
    """Why pairs are not lossless: for each target the reasons, and the sources that meet them."""
    refused: dict[str, dict[str, list[str]]] = {}
    for pair in pairs:
        if pair.verdict in (REQUANTIZE, IMPOSSIBLE):
            reasons = refused.setdefault(pair.target, {})
            reasons.setdefault(pair.reason, []).append(f"{pair.source.format} {pair.source.name}")
    lines = ["## Why the others are not", "", "For each target the rule, and the sources that it refuses.", ""]
    for target in TARGETS:
        lines += [f"**{target}**", ""]
        lines += [f"- {reason} ({'; '.join(sources)})" for reason, sources in refused.get(target, {}).items()]
        lines.append("")
    return "\n".join(lines)


def _sizes(sizes: Sequence[Sizes]) -> str:
    lines = ["| target | numbers | out_features | in_features |", "|---|---|---|---|"]
    for target, numbers, *multiples in sizes:
        cells = [str(multiple) if multiple > 1 else "any" for multiple in multiples]
        lines.append(f"| {target} | {numbers} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _others() -> str:
    return ", ".join(target for target in TARGETS if target not in quantizable_targets())


def _schemes() -> str:
    lines = ["| target | schemes |", "|---|---|"]
    for target in quantizable_targets():
        names = [*MIXES, *PURE] if target == "gguf" else scheme_names(target)
        lines.append(f"| {target} | {', '.join(f'`{name}`' for name in names)} |")
    bits = ", ".join(f"{count} → `{name}`" for count, name in BY_BITS.items())
    mixes = " and ".join(f"`{name}`" for name in MIXES)
    return "\n".join(lines) + "\n\n" + _MIXES.format(default=DEFAULT, bits=bits, mixes=mixes)
