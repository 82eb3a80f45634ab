"""A GGUF file as a checkpoint: Hugging Face names, config and row order, the weights as the file quantized them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.checkpoint.base import PIECE_ELEMENTS, Checkpoint, TensorInfo, naming, read_json
from aphroquant.checkpoint.gguf_model import hugging_face_config
from aphroquant.checkpoint.gguf_names import ROPE_FACTORS, hugging_face_name, permuted_heads, unpermuted_rows
from aphroquant.checkpoint.gguf_reader import GgufTensor, read_gguf_header
from aphroquant.checkpoint.tensor_io import read_bytes
from aphroquant.errors import InputError
from aphroquant.formats.base import Format
from aphroquant.formats.gguf import decode
from aphroquant.schemes import DenseScheme, QuantizedWeight, Scheme
from aphroquant.schemes.rows import rows_per_piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufCheckpoint(Checkpoint):
    """One .gguf file. `read` dequantizes; `weight` gives the numbers of the file, bit for bit."""

    quantization_config = None

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        header = read_gguf_header(path)
        self.metadata = header.metadata
        self._spans = header.spans
        stored = dict(header.tensors)
        factors = stored.pop(ROPE_FACTORS, None)  # becomes part of the config
        self._stored = {hugging_face_name(name): tensor for name, tensor in stored.items()}
        if len(self._stored) != len(stored):
            raise InputError(f"{path}: two tensors have the same Hugging Face name")
        self._global_scales = self._take_global_scales()
        rope_factors = None if factors is None else self._decode(ROPE_FACTORS, factors).float()
        self.rope_factors = rope_factors  # as the file has them, of which `config` holds only what they follow from
        with naming(path):
            self.config = hugging_face_config(header.metadata, stored, rope_factors)
        self.tensors = {name: self._tensor_info(name, tensor) for name, tensor in self._stored.items()}

    @property
    def format(self) -> Format | None:
        return None

    @property
    def format_name(self) -> str:
        return "gguf"

    def read(self, name: str) -> Tensor:
        info = self.info(name)
        tensor = self._decode(name, self._stored[name])
        rows = self._row_order(name)
        return tensor.to(info.dtype) if rows is None else tensor.to(info.dtype)[rows]

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return {
            name.removesuffix(".weight"): tensor.block_type.scheme
            for name, tensor in self._stored.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        }

    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    def weight(self, module: str) -> QuantizedWeight:
        if module not in self._schemes:
            raise InputError(f"{self.path}: there is no weight of a module {module!r}")
        name = f"{module}.weight"
        weight = self._weight(name, self._stored[name])
        rows = self._row_order(name)
        if rows is None:
            return weight
        ordered = {key: tensor[rows] if tensor.ndim else tensor for key, tensor in weight.tensors.items()}
        return QuantizedWeight(weight.scheme, ordered, weight.shape)

    def read_pieces(self, name: str) -> Iterator[Tensor]:
        module = name.removesuffix(".weight")
        if name not in self.tensors or module == name or module not in self._schemes:
            yield from super().read_pieces(name)
            return
        for piece in self.weight_pieces(module):
            dense = piece["weight"] if isinstance(piece.scheme, DenseScheme) else piece.dequantize()
            yield dense.to(self.tensors[name].dtype).flatten()

    def weight_pieces(self, module: str, max_elements: int = PIECE_ELEMENTS) -> Iterator[QuantizedWeight]:
        name = f"{module}.weight"
        if module not in self._schemes or self._row_order(name) is not None:
            yield from super().weight_pieces(module, max_elements)
            return
        tensor = self._stored[name]
        rows, columns = tensor.shape
        nbytes = tensor.nbytes // rows  # of a row, which is a whole number of blocks
        size = rows_per_piece(columns, max_elements)
        for start in range(0, rows, size):
            count = min(size, rows - start)
            place = tensor._replace(shape=(count, columns), begin=tensor.begin + start * nbytes, nbytes=count * nbytes)
            yield self._weight(name, place)

    def carried_files(self) -> list[Path]:
        """What lies beside the file if a tokenizer does: a folder of nothing but GGUF files tells nothing."""
        return super().carried_files() if self._has_tokenizer_beside else []

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._has_tokenizer_beside:
            from aphroquant.checkpoint.tokenizer import load_tokenizer

            return load_tokenizer(self.directory)
        from aphroquant.checkpoint.gguf_tokenizer import build_tokenizer

        with naming(self.path):
            return build_tokenizer(self.metadata, self.config["max_position_embeddings"])

    def save_tokenizer(self, directory: Path) -> None:
        super().save_tokenizer(directory)
        # transformers 5 writes a class name that 4 does not know; this one both do.
        path = directory / "tokenizer_config.json"
        settings = {**read_json(path), "tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def stored_metadata(self) -> dict[str, bytes]:
        """Every metadata value as the bytes of the file, its type included."""
        return {
            key: read_bytes(self.path, key, begin, end - begin).numpy().tobytes()
            for key, (begin, end) in self._spans.items()
        }

    @property
    def _has_tokenizer_beside(self) -> bool:
        return (self.directory / "tokenizer.json").exists()

    def _take_global_scales(self) -> dict[str, GgufTensor]:
        """The scales of whole tensors, which NVFP4 needs and cannot hold, out of the stored tensors: by module."""
        scales = {}
        for module, tensor in [(name.removesuffix(".weight"), tensor) for name, tensor in self._stored.items()]:
            if tensor.block_type.name == "NVFP4" and f"{module}.scale" in self._stored:
                scales[module] = self._stored.pop(f"{module}.scale")
        return scales

    def _tensor_info(self, name: str, tensor: GgufTensor) -> TensorInfo:
        scheme = tensor.block_type.scheme
        dtype = scheme.dtype if isinstance(scheme, DenseScheme) else torch.float32
        scale = self._global_scales.get(name.removesuffix(".weight"))
        nbytes = tensor.nbytes + (scale.nbytes if scale else 0)
        return TensorInfo(name, dtype, tensor.shape, self.path, nbytes, tensor.begin)

    def _weight(self, name: str, tensor: GgufTensor) -> QuantizedWeight:
        data = read_bytes(self.path, name, tensor.begin, tensor.nbytes)
        columns = tensor.shape[-1]
        rows = tensor.nbytes * tensor.block_type.block_size // (columns * tensor.block_type.block_bytes)
        weight = decode(tensor.block_type, data, (rows, columns))
        scale = self._global_scales.get(name.removesuffix(".weight"))
        if scale is None:
            return weight
        number = self._decode(f"{name.removesuffix('.weight')}.scale", scale)
        if number.numel() != 1:
            raise InputError(f"{self.path}: {name} has {number.numel()} scales; only one for all of it is supported")
        return replace(weight, tensors={**weight.tensors, "global_scale": number.double().reshape(())})

    def _decode(self, name: str, tensor: GgufTensor) -> Tensor:
        weight = self._weight(name, tensor)
        dense = isinstance(weight.scheme, DenseScheme)
        return (weight["weight"] if dense else weight.dequantize()).view(tensor.shape)

    def _row_order(self, name: str) -> Tensor | None:
        """Where the rows of a stored q or k projection belong, None for every other tensor."""
        heads = permuted_heads(name, self.config, self.config["model_type"])
        if heads is None:
            return None
        with naming(self.path):
            return unpermuted_rows(name, self._stored[name].shape[0], heads)
