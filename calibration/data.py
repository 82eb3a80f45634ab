"""Calibration data: files (or the bundled texts) as seeded windows of tokens.

All texts form one stream of tokens, without padding and with no special tokens but those of chat templates. It is cut
into chunks of `seq_len`, and the windows are `samples` random ones, in the order of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.records import read_documents
from aphroquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXTS = Path(__file__).parent / "default_texts"
SEPARATOR = "\n\n"  # between texts
_BATCH_CHARACTERS = 1 << 16  # texts are tokenized in pieces of at least this size: in parallel, and in linear time


class DataSource(NamedTuple):
    """One file that was read: `name` as given ("default: ..." if bundled) and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True)
class CalibrationData:
    """`windows` int64 [samples, seq_len] and where they come from; `num_tokens` is what there was to choose from."""

    windows: Tensor
    sources: tuple[DataSource, ...]
    num_tokens: int

    @property
    def sha256(self) -> str:
        """Of the windows themselves: equal data whatever the files were called."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()


def default_text(split: Literal["calibration", "evaluation"]) -> str:
    """The bundled plain text: one part to calibrate on, and a smaller one that shares nothing with it."""
    return SEPARATOR.join(path.read_text(encoding="utf-8").strip() for path in _default_files(split, ".txt"))


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, paths: Sequence[Path] = (), *, samples: int, seq_len: int, seed: int
) -> CalibrationData:
    """Windows from the files, or from the bundled calibration set if there are none."""
    if samples < 1 or seq_len < 2:
        raise UsageError(f"samples = {samples} must be at least 1, and seq_len = {seq_len} at least 2")
    bundled = not paths
    files = _default_files("calibration") if bundled else [Path(path) for path in paths]
    documents = [document for path in files for document in read_documents(path, tokenizer)]
    token_ids = _tokenize(tokenizer, documents)
    sources = tuple(DataSource(_shown(path, bundled), _sha256(path)) for path in files)
    return CalibrationData(_choose(token_ids, samples, seq_len, seed), sources, len(token_ids))


def _choose(token_ids: Sequence[int], samples: int, seq_len: int, seed: int) -> Tensor:
    num_chunks = len(token_ids) // seq_len
    if num_chunks < samples:
        way_out = f"--samples {num_chunks}" if num_chunks else "a smaller --seq-len"
        raise InputError(
            f"the calibration text has {len(token_ids):,} tokens: {num_chunks} windows of {seq_len}, not {samples}",
            hint=f"give more text, or {way_out}",
        )
    order = torch.randperm(num_chunks, generator=torch.Generator().manual_seed(seed))
    chunks = torch.tensor(token_ids[: num_chunks * seq_len], dtype=torch.int64).view(num_chunks, seq_len)
    return chunks[order[:samples].sort().values].contiguous()


def _tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[int]:
    pieces = [piece for document in documents for piece in _pieces(document.strip("\n") + SEPARATOR)]
    if not pieces:
        return []
    batch: list[list[int]] = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
    return [token_id for token_ids in batch for token_id in token_ids]


def _pieces(text: str) -> list[str]:
    """The text cut after empty lines (or else ends of lines, or words), where tokens end anyway."""
    pieces = []
    while len(text) > 2 * _BATCH_CHARACTERS:
        for mark in ("\n\n", "\n", " "):
            cut = text.find(mark, _BATCH_CHARACTERS, 2 * _BATCH_CHARACTERS)
            if cut >= 0:
                break
        else:
            cut = _BATCH_CHARACTERS
        # A blank begins the next word's token; line ends belong to what comes before them.
        cut += 0 if text[cut : cut + 1] == " " else len(mark)
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def _default_files(split: str, suffix: str = "") -> list[Path]:
    return sorted(path for path in DEFAULT_TEXTS.glob(f"{split}_*") if path.name.endswith(suffix))


def _shown(path: Path, bundled: bool) -> str:
    return f"default: {path.name}" if bundled else str(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
