"""Which files beside the weights belong to a model and are copied along with it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from aphroquant.errors import InputError

TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' own, for templates with names
# No *.py: code in a checkpoint is neither run nor passed on. No README: it describes the source.
CARRIED_PATTERNS = (
    "tokenizer.json",
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
    "*_config.json",  # of the tokenizer, generation, processors of images, sound and video
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
# How the source was quantized: the target has its own.
_DESCRIBES_SOURCE = ("quant*_config.json", "hf_quant_config.json", "adapter_config.json")


def carried_files(directory: Path) -> list[Path]:
    """The files of `directory` to carry over, by name, and those of its folder of chat templates."""
    found = sorted(path for path in directory.iterdir() if path.is_file() and _is_carried(path.name))
    folder = directory / TEMPLATES_FOLDER
    if folder.is_dir():
        found += sorted(path for path in folder.iterdir() if path.is_file() and path.suffix == ".jinja")
    for path in found:
        _check_link(path, directory)
    return found


def _check_link(path: Path, directory: Path) -> None:
    """InputError for a link to a file of another name elsewhere: copying it would publish what is not the model's."""
    target, home = path.resolve(), directory.resolve()
    within_cache = target.parent == home.parent.parent / "blobs"  # where the Hub cache keeps the files
    if target.name != path.name and not target.is_relative_to(home) and not within_cache:
        raise InputError(
            f"{path}: is a link to {target}, outside the checkpoint",
            hint="put the file itself there, or remove the link",
        )


def carried_name(path: Path) -> str:
    """Under which name one of `carried_files` is written, its folder included."""
    return f"{TEMPLATES_FOLDER}/{path.name}" if path.parent.name == TEMPLATES_FOLDER else path.name


def _is_carried(name: str) -> bool:
    if any(fnmatchcase(name, pattern) for pattern in _DESCRIBES_SOURCE):
        return False
    return any(fnmatchcase(name, pattern) for pattern in CARRIED_PATTERNS)
