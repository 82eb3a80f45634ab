"""A tokenizer as metadata of a GGUF file: the inverse of `gguf_tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from aphroquant.checkpoint.gguf_header import Value
from aphroquant.checkpoint.gguf_sentencepiece import BYTE_TOKENS, adds_space, scores_of_merges
from aphroquant.checkpoint.gguf_splitting import TokenType, splitting_name
from aphroquant.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL_IDS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Value]:
    """tokenizer.* with a token for each of `vocab_size` rows. UsageError if llama.cpp would split text otherwise."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which a GGUF file is made from"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return {
        **_model(content, vocab_size),
        **_special_ids(tokenizer),
        **_chat_templates(tokenizer),
    }


def _model(content: Mapping[str, Any], vocab_size: int) -> dict[str, Value]:
    model = content["model"]
    if model["type"] != "BPE":
        raise UsageError(f"the tokenizer's model is {model['type']}; GGUF files are written with BPE")
    tokens, types = _tokens(content, vocab_size)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    listed: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
    }
    if model.get("byte_fallback"):
        return {**listed, **_sentencepiece(content, tokens, types, merges)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting_name(content),
        **listed,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }


def _sentencepiece(
    content: Mapping[str, Any], tokens: list[str], types: list[TokenType], merges: list[tuple[str, ...]]
) -> dict[str, Value]:
    pairs = [(left, right) for left, right in merges]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": np.array(scores_of_merges(tokens, types, pairs), dtype=np.float32),
        "tokenizer.ggml.add_space_prefix": adds_space(content),
    }


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every token by its id. Rows of the embedding that no token has are filled up with unused ones."""
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, TokenType.NORMAL)
    for added in content["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if content["model"].get("byte_fallback"):
        types |= {index: TokenType.BYTE for index, token in by_id.items() if token in BYTE_TOKENS}
        types |= {index: TokenType.UNKNOWN for index, token in by_id.items() if token == content["model"]["unk_token"]}
    if max(by_id) >= vocab_size:
        raise UsageError(
            f"the tokenizer has the token {max(by_id)}, and the model only {vocab_size} rows of embeddings"
        )
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    return tokens, [types.get(index, TokenType.UNUSED) for index in range(vocab_size)]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    ids = {theirs: getattr(tokenizer, ours, None) for theirs, ours in _SPECIAL_IDS.items()}
    values: dict[str, Value] = {f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None}
    found = list(tokenizer("a").input_ids)
    values["tokenizer.ggml.add_bos_token"] = ids["bos_token_id"] is not None and found[:1] == [ids["bos_token_id"]]
    values["tokenizer.ggml.add_eos_token"] = ids["eos_token_id"] is not None and found[-1:] == [ids["eos_token_id"]]
    return values


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    """The default template, and others under their names."""
    template = tokenizer.chat_template
    if not template:
        return {}
    named: dict[str, str] = {"default": template} if isinstance(template, str) else dict(template)
    default = named.pop("default", None)
    values: dict[str, Value] = {} if default is None else {"tokenizer.chat_template": default}
    if named:
        values["tokenizer.chat_templates"] = list(named)
        values |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    return values
