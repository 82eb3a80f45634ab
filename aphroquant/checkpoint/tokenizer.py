"""Tokenizers from the files beside a checkpoint, through transformers, never running code of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aphroquant.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers' AutoTokenizer finds in `directory`. InputError if there is none."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{directory}: there is no tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json beside the weights",
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without config.json AutoTokenizer has no model type to choose a class by; tokenizer.json says it all.
    choose = AutoTokenizer if (directory / "config.json").exists() else PreTrainedTokenizerFast
    try:
        tokenizer: PreTrainedTokenizerBase = choose.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
    return tokenizer
