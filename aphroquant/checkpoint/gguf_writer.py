"""Writing a GGUF file so that a file of its name is either complete or not there.

The header holds the place of every tensor and stands first, so shapes and types are planned before any data comes; then
each tensor is written to its place, in any order, and memory holds one, or a piece of one, at a time. The file has
another name until it is complete and on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from aphroquant.checkpoint.disk import check_parents, fsync, telling_disk_errors
from aphroquant.checkpoint.gguf_header import ALIGNMENT, PlacedTensor, Value, encode_header, place
from aphroquant.checkpoint.gguf_metadata import architecture_of, model_metadata, rope_factors
from aphroquant.checkpoint.gguf_names import ROPE_FACTORS, gguf_name, permuted_heads, permuted_rows, unpermuted_rows
from aphroquant.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from aphroquant.checkpoint.hashes import FileRecord, GrowingFileHash, Span
from aphroquant.checkpoint.leftovers import claim, partial_path, remove_leftovers
from aphroquant.checkpoint.tensor_io import write_bytes
from aphroquant.errors import UsageError
from aphroquant.formats.fp4 import stored_factor
from aphroquant.formats.gguf import BlockType, block_type, decode, encode, exact_type, in_type, quantize
from aphroquant.models.spec import decoder_spec
from aphroquant.schemes import DenseScheme, QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufTensorPlan(NamedTuple):
    """What a tensor will be: its shape, and the name of its GGUF type ("Q4_K"; vectors must be "F32")."""

    shape: tuple[int, ...]
    type: str


class EncodedRows(NamedTuple):
    """Consecutive rows as bytes [N, bytes of a row] in the order of the file, and NVFP4's scale of the whole tensor."""

    num_rows: int
    data: Tensor
    global_scale: Tensor | None


class GgufWriter:
    """Writes the model of `config` (config.json) and `tokenizer` to the file `path`, atomically.

    Use as a context manager: `plan` once, `add` every planned tensor under its Hugging Face name (or `add_rows`, if it
    is too large to be whole in memory), end with `finish`.
    Leaving without it, or on an exception, removes what was written. An existing file is replaced only with
    `overwrite`, by the last rename. `name` is the model's, for people.

    `metadata` comes before what follows from the model, and is all there is of the tokenizer if that is None;
    `rope_divisors` [head_dim / 2] too. `removed` says what killed writers of the same name had left, and `record` what
    the finished file is.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        overwrite: bool = False,
        name: str | None = None,
        metadata: Mapping[str, Value] | None = None,
        rope_divisors: Tensor | None = None,
    ) -> None:
        self.path = Path(path).expanduser().resolve()  # through a link, so that its target is replaced
        self._config = config
        self._spec = decoder_spec(config)
        self._architecture = architecture_of(self._spec)
        self._tokenizer = {} if tokenizer is None else tokenizer_metadata(tokenizer, self._spec.vocab_size)
        self._metadata = metadata or {}
        self._rope_divisors = rope_factors(self._spec) if rope_divisors is None else rope_divisors
        self._name = self.path.stem if name is None else name
        self._overwrite = overwrite
        self._partial = partial_path(self.path)
        self.removed: list[str] = []
        self._planned: dict[str, PlacedTensor] = {}  # by the name in the file
        self._missing: set[str] = set()
        self._num_rows: dict[str, int] = {}  # written so far, of matrices that come in pieces
        self._descriptor: int | None = None
        self._made_parent = False
        self._data_begin = 0
        self._num_written = 0
        self._hash: GrowingFileHash | None = None
        self._filled = 0  # from the beginning, without a gap but for padding
        self.record: FileRecord | None = None
        self._check_target()

    def __enter__(self) -> Self:
        with self._disk_errors_told():
            self._made_parent = not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.removed = remove_leftovers(self.path)
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
            claim(self._descriptor, self.path)
            os.ftruncate(self._descriptor, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._hash is not None:
            self._hash.stop()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._partial.unlink(missing_ok=True)  # after finish it is gone already
        if self._made_parent and error is not None and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    @property
    def num_bytes(self) -> int:
        """Bytes of the file, once it is planned."""
        return self._data_begin + max((tensor.begin + tensor.nbytes for tensor in self._planned.values()), default=0)

    def plan(self, tensors: Mapping[str, GgufTensorPlan]) -> None:
        """Say what will be added, by Hugging Face names; writes the header. UsageError for what GGUF cannot hold."""
        assert self._descriptor is not None
        assert not self._planned, "a file is planned once"
        factors = self._rope_divisors
        self._planned, header = self._laid_out(tensors)
        self._missing = set(self._planned)
        self._data_begin = len(header)
        with self._disk_errors_told():
            write_bytes(self._descriptor, self.path, 0, torch.frombuffer(bytearray(header), dtype=torch.uint8))
            os.ftruncate(self._descriptor, self.num_bytes)
        spans = {name: Span(len(header) + tensor.begin, tensor.nbytes) for name, tensor in self._planned.items()}
        self._hash, self._filled = GrowingFileHash(self._descriptor, spans), len(header)
        self._hash.reached(self._filled)
        if factors is not None:
            self._put(ROPE_FACTORS, 0, factors)

    def planned_bytes(self, tensors: Mapping[str, GgufTensorPlan]) -> int:
        """How long the file will be with these tensors."""
        placed, header = self._laid_out(tensors)
        return len(header) + max((tensor.begin + tensor.nbytes for tensor in placed.values()), default=0)

    def _laid_out(self, tensors: Mapping[str, GgufTensorPlan]) -> tuple[dict[str, PlacedTensor], bytes]:
        """Where the tensors go, by their names in the file, and the header."""
        chosen: dict[str, tuple[BlockType, tuple[int, ...]]] = {}
        factors = self._rope_divisors
        if factors is not None:
            chosen[ROPE_FACTORS] = block_type("F32"), tuple(factors.shape)
        for name, (shape, type_name) in tensors.items():
            kind = block_type(type_name)
            stored = self._stored_name(name)
            _check(name, shape, kind)
            chosen[stored] = kind, shape
            if kind.name == "NVFP4":
                chosen[_scale_name(stored)] = block_type("F32"), (1,)
        placed = place(chosen)
        metadata = {**model_metadata(self._spec, self._name, placed), **self._tokenizer, **self._metadata}
        return placed, encode_header(metadata, placed)

    def add(self, name: str, value: Tensor | QuantizedWeight, *, importance: Tensor | None = None) -> None:
        """Store one planned tensor whole: `encoded` and `add_rows`."""
        found = value.shape if isinstance(value, QuantizedWeight) else tuple(value.shape)
        shape = self._planned_tensor(name).shape
        if found != shape:
            raise UsageError(f"{name} has shape {list(found)}, but {list(shape)} was planned")
        self.add_rows(name, 0, self.encoded(name, value, importance=importance))

    def encoded(self, name: str, value: Tensor | QuantizedWeight, *, importance: Tensor | None = None) -> EncodedRows:
        """Consecutive rows of a planned matrix (of a q or k projection whole heads), or a vector, as they are stored.

        Dense values are cast or quantized to the planned type (`importance`: see `formats.gguf.quantize`); quantized
        ones must fit it to the last bit, else it is a UsageError. Nothing is changed: any thread may call it.
        """
        planned = self._planned_tensor(name)
        kind, columns = planned.block_type, planned.shape[-1]
        weight = value if isinstance(value, QuantizedWeight) else QuantizedWeight.dense(value.reshape(-1, columns))
        if isinstance(weight.scheme, DenseScheme):
            held = quantize(kind, weight["weight"], importance, name=name)
        else:
            held = _held(name, weight, kind)
        data = encode(kind, held)  # [N, bytes of a row]
        count = value.shape[0]
        heads = self._heads(name, count)
        if heads is not None:  # a bias is one row of data
            data = data.view(count, -1)[permuted_rows(name, count, heads)]
        scale = held["global_scale"].reshape(1) if kind.name == "NVFP4" else None
        return EncodedRows(count, data, scale)

    def decoded(self, name: str, encoded: EncodedRows) -> QuantizedWeight:
        """The rows of a matrix as a reader of the file will find them."""
        planned = self._planned_tensor(name)
        count, data, scale = encoded
        heads = self._heads(name, count)
        if heads is not None:
            data = data[unpermuted_rows(name, count, heads)]
        weight = decode(planned.block_type, data.flatten(), (count, planned.shape[1]))
        if scale is None:
            return weight
        return replace(weight, tensors={**weight.tensors, "global_scale": scale.double().reshape(())})

    def add_rows(self, name: str, start: int, encoded: EncodedRows) -> None:
        """Store rows from `start` on; a tensor's rows come in order. ResourceError unless they can be read back."""
        stored = self._stored_name(name)
        planned = self._planned_tensor(name)
        assert start == self._num_rows.get(stored, 0), f"{name}: row {start} is not the next"
        end = start + encoded.num_rows
        assert end <= planned.shape[0], f"{name} has more than the planned {planned.shape[0]} rows"
        self._put(stored, planned.nbytes // planned.shape[0] * start, encoded.data)
        self._num_rows[stored] = end
        if encoded.global_scale is not None and start == 0:
            self._put(_scale_name(stored), 0, encoded.global_scale)

    def finish(self) -> Path:
        """Complete the file, put it into place, and return its path."""
        assert self._descriptor is not None
        assert not self._missing, f"planned but not added: {', '.join(sorted(self._missing))}"
        with self._disk_errors_told():
            os.fsync(self._descriptor)
            assert self._hash is not None
            self.record = self._hash.record(self.num_bytes)
            self._check_target()  # someone may have been here meanwhile
            self._partial.rename(self.path)
            fsync(self.path.parent)
        return self.path

    def tensor_sums(self) -> dict[str, str]:
        """CRC-32 of each tensor's bytes, by its name in the file, once that is finished."""
        assert self._hash is not None
        return self._hash.tensor_sums()

    def _check_target(self) -> None:
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a directory", hint="give the name of a .gguf file")
        check_parents(self.path)
        if self.path.exists() and not self._overwrite:
            raise UsageError(f"{self.path} exists", hint="give another --out, or --overwrite to replace it")

    def _stored_name(self, name: str) -> str:
        stored = gguf_name(name)
        if stored is None:
            raise UsageError(f"{name}: llama.cpp's {self._architecture} has no such tensor")
        return stored

    def _planned_tensor(self, name: str) -> PlacedTensor:
        stored = self._stored_name(name)
        assert stored in self._planned, f"{name} was not planned"
        return self._planned[stored]

    def _heads(self, name: str, count: int) -> int | None:
        """How many heads that many rows are, if they are stored in another order."""
        heads, rows = permuted_heads(name, self._config, self._architecture), self._planned_tensor(name).shape[0]
        if heads is None:
            return None
        assert count * heads % rows == 0, f"{name}: {count} rows are no whole heads"
        return count * heads // rows

    def _put(self, stored: str, begin: int, data: Tensor) -> None:
        """Write bytes of one tensor to their place in it; they end it, or more will come."""
        tensor = self._planned[stored]
        assert stored in self._missing, f"{stored} was added before"
        assert self._descriptor is not None
        position = self._data_begin + tensor.begin + begin
        with self._disk_errors_told():
            end = write_bytes(self._descriptor, self.path, position, data)
        self._num_written += end - position
        assert end <= self._data_begin + tensor.begin + tensor.nbytes, f"{stored} has more bytes than were planned"
        if end == self._data_begin + tensor.begin + tensor.nbytes:
            self._missing.remove(stored)
        if position - self._filled < ALIGNMENT and self._hash is not None:  # the next in order
            self._filled = max(self._filled, end)
            self._hash.reached(self._filled)

    def _disk_errors_told(self) -> AbstractContextManager[None]:
        return telling_disk_errors(self.path, lambda: self._num_written)


def _check(name: str, shape: tuple[int, ...], kind: BlockType) -> None:
    if not 1 <= len(shape) <= 2 or min(shape) < 1:
        raise UsageError(f"{name} has shape {list(shape)}; vectors and matrices can be written")
    if len(shape) == 1 and kind.name != "F32":
        raise UsageError(f"{name} is a vector, which llama.cpp needs in F32, not {kind.name}")
    if shape[-1] % kind.block_size:
        raise UsageError(
            f"{name}: {kind.name} needs rows that are a multiple of {kind.block_size}, not {shape[-1]}",
            hint="choose Q8_0, Q5_0 or Q4_0 for it, whose blocks are of 32, or a float type",
        )


def _held(name: str, weight: QuantizedWeight, kind: BlockType) -> QuantizedWeight:
    exact = exact_type(name, weight.scheme, weight.shape[1])
    if exact != kind:
        raise UsageError(
            f"{name}: {weight.scheme} is {exact.name} in GGUF, not {kind.name}",
            hint=f"plan {exact.name} for it, or dequantize it first",
        )
    held = in_type(name, weight, kind)
    if kind.name == "NVFP4":  # a reciprocal of another format's float32 is rounded; see formats/fp4.py
        scale = stored_factor("GGUF", name, "global_scale", held["global_scale"])
        held = replace(held, tensors={**held.tensors, "global_scale": scale})
    return held


def _scale_name(stored: str) -> str:
    return f"{stored.removesuffix('.weight')}.scale"
