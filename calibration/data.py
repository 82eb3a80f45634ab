"""Calibration data: files (or the bundled texts) as seeded windows of tokens.

All texts form one stream of tokens, without padding and with no special tokens but those of chat templates. It is cut
into chunks of `seq_len`, and the windows are `samples` random ones, in the order of the text. With weights each file is
a stream of its own and gives its share of the windows. Packed by documents, a chunk begins where a text or conversation
does (or, within a longer one, where the last chunk ended), and what is left of the last one in it is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.records import read_documents, read_template
from aphroquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEXTS = Path(__file__).parent / "default_texts"
DEFAULT = "default"  # stands for the bundled texts among files
PACKINGS = ("stream", "documents")
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
    tokenizer: PreTrainedTokenizerBase,
    paths: Sequence[Path] = (),
    *,
    samples: int,
    seq_len: int,
    seed: int,
    weights: Sequence[float] = (),
    packing: str = "stream",
    chat_template: Path | None = None,
) -> CalibrationData:
    """Windows from the files, or from the bundled calibration set if there are none (or where one is "default").

    `weights` are shares of the windows, one for each path. `chat_template` is a Jinja file in place of the model's own
    template; "none" joins the contents of conversations.
    """
    if samples < 1 or seq_len < 2:
        raise UsageError(f"samples = {samples} must be at least 1, and seq_len = {seq_len} at least 2")
    check_mixing(len(paths), weights, packing)
    template = None if chat_template is None else read_template(chat_template)
    read = [_read(tokenizer, path, template) for path in paths or [Path(DEFAULT)]]
    if not weights:
        documents = [document for text in read for document in text.documents]
        read = [_Text("the calibration text", documents, tuple(source for text in read for source in text.sources))]
    shares = shared_out(samples, weights or [1.0])
    parts, num_tokens = [], 0
    for number, (text, count) in enumerate(zip(read, shares, strict=True)):
        chunks, found = _chunks(tokenizer, text.documents, seq_len, packing)
        parts.append(_choose(chunks, found, text.name, count, seed + number))
        num_tokens += found
    return CalibrationData(torch.cat(parts), tuple(source for text in read for source in text.sources), num_tokens)


def check_mixing(num_paths: int, weights: Sequence[float], packing: str) -> None:
    """UsageError for weights that are not one for each path, and for an unknown packing."""
    if packing not in PACKINGS:
        raise UsageError(f"unknown packing {packing!r}", hint=f"packings are {', '.join(PACKINGS)}")
    if weights and len(weights) != num_paths:
        raise UsageError(f"there are {len(weights)} weights for {num_paths} calibration texts; give one for each")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise UsageError(f"the weight {weight} of a calibration text must be a positive number")


def shared_out(samples: int, weights: Sequence[float]) -> list[int]:
    """`samples` by weight: whole numbers of that sum, each less than one away from its exact share."""
    exact = [samples * (weight / sum(weights)) for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda index: (shares[index] - exact[index], index))
    for index in order[: samples - sum(shares)]:
        shares[index] += 1
    return shares


class _Text(NamedTuple):
    """A path's documents, what errors call it, and its files."""

    name: str
    documents: list[str]
    sources: tuple[DataSource, ...]


def _read(tokenizer: PreTrainedTokenizerBase, path: Path, template: str | None) -> _Text:
    bundled = str(path) == DEFAULT
    files = _default_files("calibration") if bundled else [Path(path)]
    documents = [document for file in files for document in read_documents(file, tokenizer, template)]
    if not any(document.strip() for document in documents):
        raise InputError(f"{path}: holds no text", hint="give another text")
    return _Text(str(path), documents, tuple(DataSource(_shown(file, bundled), _sha256(file)) for file in files))


def _choose(chunks: Tensor, num_tokens: int, name: str, samples: int, seed: int) -> Tensor:
    num_chunks, seq_len = chunks.shape
    if num_chunks < samples:
        way_out = f"--samples {num_chunks}" if num_chunks else "a smaller --seq-len"
        raise InputError(
            f"{name} has {num_tokens:,} tokens: {num_chunks} windows of {seq_len}, not {samples}",
            hint=f"give more text, or {way_out}",
        )
    order = torch.randperm(num_chunks, generator=torch.Generator().manual_seed(seed % 2**63))
    return chunks[order[:samples].sort().values].contiguous()


def _chunks(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int, packing: str
) -> tuple[Tensor, int]:
    """Every window [C, seq_len] that there is to choose from, and the number of tokens."""
    if packing == "stream":
        token_ids = _tokenize(tokenizer, documents)
        count = len(token_ids) // seq_len
        chunks = torch.tensor(token_ids[: count * seq_len], dtype=torch.int64).view(count, seq_len)
        return chunks, len(token_ids)
    tokens = [_tokenize(tokenizer, [document]) for document in documents]
    windows = _packed(tokens, seq_len)
    return torch.tensor(windows, dtype=torch.int64).view(len(windows), seq_len), sum(map(len, tokens))


def _packed(documents: Sequence[Sequence[int]], seq_len: int) -> list[list[int]]:
    windows: list[list[int]] = []
    open_window: list[int] = []
    for document in documents:
        if open_window:
            open_window.extend(document)
            if len(open_window) >= seq_len:
                windows.append(open_window[:seq_len])
                open_window = []
            continue
        whole = len(document) // seq_len
        windows.extend(list(document[i * seq_len : (i + 1) * seq_len]) for i in range(whole))
        open_window = list(document) if whole == 0 else []
    return windows


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
