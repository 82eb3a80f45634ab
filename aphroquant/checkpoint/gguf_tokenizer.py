"""The tokenizer in a GGUF file's metadata, as transformers would have it from the model's own tokenizer.json.

The file holds tokens, merges and their types, and only a name (`tokenizer.ggml.pre`) for how text is split before the
merges. A wrong split gives a model that seems to work and is worse, so an unknown name is an error and not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aphroquant.checkpoint.gguf_sentencepiece import sentencepiece_tokenizer
from aphroquant.checkpoint.gguf_splitting import SPLITTINGS, Splitting, TokenType
from aphroquant.errors import InputError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

_HINT = "put the model's tokenizer.json and tokenizer_config.json beside the file"


def build_tokenizer(metadata: Mapping[str, Any], max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer, with special tokens and chat template. InputError naming what is missing or not supported."""
    from transformers import PreTrainedTokenizerFast

    tokens = _strings(metadata, "tokens")
    types = _token_types(metadata, tokens)
    special = {
        name: tokens[index]
        for name, index in {
            "bos_token": _token_id(metadata, "bos_token_id", tokens),
            "eos_token": _token_id(metadata, "eos_token_id", tokens),
            "pad_token": _token_id(metadata, "padding_token_id", tokens),
            "unk_token": _token_id(metadata, "unknown_token_id", tokens),
        }.items()
        if index is not None
    }
    tokenizer, adds_bos = _model(metadata, tokens, types, special.get("unk_token"))
    added = _added_tokens(tokens, types)
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        add_bos_token=_flag(metadata, "add_bos_token", adds_bos) and "bos_token" in special,
        add_eos_token=_flag(metadata, "add_eos_token", False) and "eos_token" in special,
        **special,
    )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        fast.chat_template = template
    built: PreTrainedTokenizerBase = fast
    return built


def _model(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], unknown: str | None
) -> tuple[Tokenizer, bool]:
    """The tokenizer without added tokens, and whether it adds a beginning if the file does not say."""
    model = str(metadata.get("tokenizer.ggml.model"))
    repeated = len(tokens) - len(set(tokens))
    if repeated:
        raise InputError(f"tokenizer.ggml.tokens has {repeated} tokens twice")
    if model == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(name, str) or name not in SPLITTINGS:
            raise InputError(f"the pre-tokenizer {name!r} is unknown; known are {', '.join(SPLITTINGS)}", hint=_HINT)
        splitting = SPLITTINGS[name]
        return _byte_level_bpe(tokens, _strings(metadata, "merges", least=0), splitting), splitting.adds_bos
    if model == "llama":
        if _flag(metadata, "remove_extra_whitespaces", False):
            raise InputError("tokenizer.ggml.remove_extra_whitespaces is not supported", hint=_HINT)
        add_space = _flag(metadata, "add_space_prefix", True)
        scores = _scores(metadata, tokens)
        return sentencepiece_tokenizer(tokens, scores, types, unknown, add_space=add_space), True
    raise InputError(f"the tokenizer model {model} cannot be rebuilt exactly; gpt2 and llama can", hint=_HINT)


def _byte_level_bpe(tokens: list[str], merges: list[str], splitting: Splitting) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [_pair(merge) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    missing = next((part for pair in pairs for part in (*pair, "".join(pair)) if part not in vocabulary), None)
    if missing is not None:
        raise InputError(f"tokenizer.ggml.merges uses {missing!r}, which is no token")
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=splitting.ignore_merges))
    steps: list[Any] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.expression is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.expression), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.expression is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise InputError(f"tokenizer.ggml.merges holds {merge!r}, which is no pair")
    return left, right


def _added_tokens(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """Control tokens as special ones, user-defined ones as plain added ones, in the order of their ids."""
    from tokenizers import AddedToken

    return [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED) and token
    ]


def _token_types(metadata: Mapping[str, Any], tokens: list[str]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [TokenType.NORMAL] * len(tokens)
    if not isinstance(types, np.ndarray) or len(types) != len(tokens) or types.dtype.kind not in "iu":
        raise InputError(f"tokenizer.ggml.token_type must be {len(tokens)} numbers, one a token")
    return [int(kind) for kind in types]


def _scores(metadata: Mapping[str, Any], tokens: list[str]) -> list[float]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise InputError(f"tokenizer.ggml.scores must be {len(tokens)} finite numbers, one a token")
    return [float(score) for score in scores]


def _strings(metadata: Mapping[str, Any], key: str, *, least: int = 1) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or len(value) < least:
        raise InputError(f"tokenizer.ggml.{key} is missing or no list of strings")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise InputError(f"tokenizer.ggml.{key} = {value!r} is no token of {len(tokens)}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise InputError(f"tokenizer.ggml.{key} = {value!r} must be true or false")
    return value
