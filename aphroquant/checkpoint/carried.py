"""Which files beside the weights belong to a model and are copied along with it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

# No *.py: code in a checkpoint is neither run nor passed on. No README: it describes the source.
CARRIED_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "chat_template.*",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def carried_files(directory: Path) -> list[Path]:
    """The files of `directory` to carry over, by name."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in CARRIED_PATTERNS)
    )
