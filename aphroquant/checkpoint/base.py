"""What every checkpoint offers, whatever its files: configuration, tensors by Hugging Face name, schemes, tokenizer.

Opening reads headers only; a tensor's bytes are read when it is asked for, and only its own.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint.carried import carried_files
from aphroquant.checkpoint.files import read_small
from aphroquant.errors import InputError
from aphroquant.formats.base import Format
from aphroquant.models.spec import DecoderSpec, decoder_spec
from aphroquant.schemes import DenseScheme, QuantizedWeight, Scheme
from aphroquant.schemes.rows import split_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_ELEMENTS = 2**24  # 64 MiB as float32: of a matrix that is read in pieces

# Stored beside a quantized weight under the same module name, and no part of it.
COMPANIONS = frozenset({"bias", "k_scale", "v_scale", "q_scale", "kv_scale", "output_scale"})


class TensorInfo(NamedTuple):
    """One stored tensor. `dtype` is what `read` gives; `nbytes` is what the file holds, from `begin` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    begin: int


class Checkpoint(ABC):
    """A model on disk. `source` is as the user gave it, `path` the directory or file that it stands for.

    `config` is config.json (for GGUF made from the metadata) without `quantization_config` and without `auto_map`:
    code that a checkpoint names is never run.
    """

    source: str
    path: Path
    config: dict[str, Any]
    quantization_config: dict[str, Any] | None
    tensors: Mapping[str, TensorInfo]

    @property
    @abstractmethod
    def format(self) -> Format | None:
        """The format of the quantized layers; None if there are none (or for GGUF, whose types are per tensor)."""

    @property
    @abstractmethod
    def format_name(self) -> str:
        """ "gptq", "awq", ..., "gguf", or "dense"."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One stored tensor, in memory of its own (GGUF: dequantized to float32)."""

    def read_pieces(self, name: str) -> Iterator[Tensor]:
        """What `read` gives, flattened, in consecutive pieces of at most about PIECE_ELEMENTS elements."""
        flat = self.read(name).flatten()
        for start in range(0, flat.numel(), PIECE_ELEMENTS):
            yield flat[start : start + PIECE_ELEMENTS]

    @abstractmethod
    def schemes(self) -> Mapping[str, Scheme]:
        """Every module with a two-dimensional weight, embeddings and head included, from headers alone."""

    @abstractmethod
    def weight(self, module: str) -> QuantizedWeight:
        """The weight of one module of `schemes`, in canonical form."""

    def fetched(self, module: str) -> Callable[[], QuantizedWeight]:
        """What gives the weight, perhaps with its bytes read already: to read in one thread, and decode in another."""
        return partial(self.weight, module)

    def weight_pieces(self, module: str, max_elements: int = PIECE_ELEMENTS) -> Iterator[QuantizedWeight]:
        """The weight as consecutive rows (`split_rows`), so that what is made of it need not be whole in memory."""
        yield from split_rows(self.weight(module), max_elements)

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template if there is one."""

    @cached_property
    def spec(self) -> DecoderSpec:
        """The decoder that `config` describes. InputError for a family that is not known."""
        if not self.config and self.path.is_file():
            raise InputError(
                f"{self.path}: there is no config.json beside the file, which says what model its tensors are",
                hint="give the model's directory, or put its config.json beside the file",
            )
        layers = self.config.get("num_hidden_layers")
        if isinstance(layers, int) and layers > len(self.tensors):  # before anything of that length is made
            raise InputError(
                f"{self.path}: the config claims {layers} layers, and there are {len(self.tensors)} tensors"
            )
        with naming(self.path):
            return decoder_spec(self.config)

    @property
    def directory(self) -> Path:
        """Where the files beside the weights are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def num_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def has(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """The header of one stored tensor. InputError naming checkpoint and tensor if there is none."""
        if name not in self.tensors:
            raise InputError(f"{self.path}: there is no tensor {name!r}")
        return self.tensors[name]

    def dense_names(self) -> list[str]:
        """Stored tensors that belong to no quantized weight: norms, biases, dense embeddings, KV-cache scales..."""
        quantized = {module for module, scheme in self.schemes().items() if not isinstance(scheme, DenseScheme)}
        return [name for name in self.tensors if suffix(name) in COMPANIONS or not quantized & self._modules_of(name)]

    def module_bytes(self) -> dict[str, int]:
        """Stored bytes of every module's weight, scales and zero points included, biases not."""
        stored: dict[str, int] = defaultdict(int)
        for name, info in self.tensors.items():
            modules = self._modules_of(name) if suffix(name) not in COMPANIONS else ()
            for module in modules:
                stored[module] += info.nbytes // len(modules)
        return {module: stored[module] for module in self.schemes()}

    def carried_files(self) -> list[Path]:
        """Files to copy along with the model: tokenizer, templates, generation settings, licence."""
        return carried_files(self.directory)

    def files(self) -> dict[str, Path]:
        """Every file that the model is read from, by its name in `directory`."""
        weights = dict.fromkeys(info.file for info in self.tensors.values())
        paths = [*weights, *self._settings_files(), *self.carried_files()]
        return {path.relative_to(self.directory).as_posix(): path for path in paths}

    def places(self, names: Iterable[str]) -> dict[Path, list[tuple[int, int]]]:
        """Every file that tensors are in, each with where those of these names begin and end."""
        found: dict[Path, list[tuple[int, int]]] = {info.file: [] for info in self.tensors.values()}
        for info in (self.tensors[name] for name in names if name in self.tensors):
            found[info.file].append((info.begin, info.begin + info.nbytes))
        return found

    def _settings_files(self) -> list[Path]:
        """Files that say what the tensors mean."""
        return []

    def save_tokenizer(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
        self.tokenizer().save_pretrained(directory)

    def _modules_of(self, name: str) -> set[str]:
        """The modules that a stored tensor is part of: one, or all of a stack."""
        return {name.rpartition(".")[0]}


def is_kv_scale(name: str) -> bool:
    """Whether a tensor is a scale of the KV cache, in any of the spellings in use."""
    if suffix(name) == "output_scale":
        return name.endswith(("k_proj.output_scale", "v_proj.output_scale"))
    return suffix(name) in ("k_scale", "v_scale", "kv_scale", "q_scale")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the checkpoint's path before the message of an InputError from code that knows only a part of it."""
    try:
        yield
    except InputError as error:
        if str(path) in error.message:
            raise
        raise InputError(f"{path}: {error.message}", hint=error.hint) from error


def suffix(name: str) -> str:
    """The last part of a tensor's dotted name."""
    return name.rpartition(".")[2]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. InputError naming the file otherwise."""
    try:
        value = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
