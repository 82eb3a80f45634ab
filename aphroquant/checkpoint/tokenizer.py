"""Tokenizers from the files beside a checkpoint, through transformers, never running code of the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aphroquant.checkpoint.files import check_ordinary
from aphroquant.errors import InputError, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_SAMPLE = "How are you?"
_OPENED = ("*.json", "*.model", "*.txt", "*.jinja")  # by transformers, whatever they are


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers' AutoTokenizer finds in `directory`. InputError if there is none."""
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{directory}: there is no tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json beside the weights",
        )
    for pattern in _OPENED:
        for path in sorted(directory.glob(pattern)):
            check_ordinary(path)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Without config.json AutoTokenizer has no model type to choose a class by; tokenizer.json says it all.
    choose = AutoTokenizer if (directory / "config.json").exists() else PreTrainedTokenizerFast
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = choose.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
            tokenizer.decode(tokenizer(_SAMPLE)["input_ids"])  # some settings fail only when they are used
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of the tokenizers library are no Exceptions
        if is_out_of_memory(error):
            raise
        raise InputError(f"{directory}: the tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning about the config, whose values it writes to the terminal as they stand."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
