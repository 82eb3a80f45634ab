"""How byte-level BPE tokenizers split text before the merges, by the names that llama.cpp gives them.

A GGUF file holds only such a name (`tokenizer.ggml.pre`). A wrong split gives a model that seems to work and is worse,
so what has no name is refused, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from aphroquant.errors import UsageError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _WORDS_AND_SPACES
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _WORDS_AND_SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`. Control and user-defined tokens are matched before anything is split."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Splitting:
    """How text becomes pieces: by GPT-2's rule, after single digits, or by one expression."""

    expression: str | None = None  # None: GPT-2's own, which tokenizers has built in
    single_digits: bool = False
    composed: bool = False  # NFC first
    ignore_merges: bool = False  # a piece that is a token stays whole, whatever its merges
    adds_bos: bool = False  # unless the file says otherwise


_GPT2 = Splitting()
_DIGITS = Splitting(single_digits=True)
_LLAMA3 = Splitting(_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)
_QWEN2 = Splitting(_QWEN2_SPLIT, composed=True)
SPLITTINGS = {  # of several names the first is the one that is written
    "gpt-2": _GPT2,
    "default": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": Splitting(_LLAMA3_SPLIT),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Splitting(_TEKKEN_SPLIT, ignore_merges=True, adds_bos=True),
}


def splitting_name(tokenizer: Mapping[str, Any]) -> str:
    """The name for the splitting of a tokenizer.json. UsageError if there is none.

    llama.cpp never composes characters, so whether the normalizer does makes no difference to the name.
    """
    found = Splitting(
        *_split_parts(tokenizer.get("pre_tokenizer")),
        composed=_composes(tokenizer.get("normalizer")),
        ignore_merges=bool(tokenizer["model"].get("ignore_merges")),
    )
    for name, known in SPLITTINGS.items():
        if replace(known, composed=found.composed, adds_bos=False) == found:
            return name
    raise _unnamed(f"splits by {found.expression!r}, ignore_merges {found.ignore_merges}")


def _split_parts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str | None, bool]:
    """(expression or None for GPT-2's, whether digits are split first)."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise _unnamed(f"pre_tokenizer is {pre_tokenizer}")
    by_rule = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_rule:
        return None, False
    if kinds == ["Digits", "ByteLevel"] and by_rule and steps[0].get("individual_digits"):
        return None, True
    if kinds == ["Split", "ByteLevel"] and not by_rule:
        split = steps[0]
        expression = split["pattern"].get("Regex")
        if expression is not None and split["behavior"] == "Isolated" and not split.get("invert"):
            return expression, False
    raise _unnamed(f"pre_tokenizer is {pre_tokenizer}")


def _composes(normalizer: Mapping[str, Any] | None) -> bool:
    kinds = [step["type"] for step in _steps(normalizer, "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise _unnamed(f"normalizer is {normalizer}")
    return kinds == ["NFC"]


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[key]) if part["type"] == "Sequence" else [part]


def _unnamed(why: str) -> UsageError:
    return UsageError(
        f"the tokenizer's {why}, for which GGUF has no name that is known here",
        hint=f"known are {', '.join(SPLITTINGS)}",
    )
