"""Safetensors checkpoints: a directory of one or several shards with config.json, or a single file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from aphroquant.checkpoint.base import (
    COMPANIONS,
    PIECE_ELEMENTS,
    Checkpoint,
    TensorInfo,
    naming,
    read_json,
    suffix,
)
from aphroquant.checkpoint.files import PICKLE_SUFFIXES
from aphroquant.checkpoint.safetensors_header import StoredTensor, read_header
from aphroquant.checkpoint.tensor_io import as_tensor, read_bytes
from aphroquant.checkpoint.tokenizer import load_tokenizer
from aphroquant.errors import InputError
from aphroquant.formats.base import Format, Part, TensorHeader
from aphroquant.schemes import DenseScheme, QuantizedWeight, Scheme
from aphroquant.schemes.rows import rows_per_piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CODES = ("qweight", "weight_packed", "codes", "W_q", "trellis")  # of modules that have no tensor called weight
_SCALES = ("weight_scale", "weight_scale_inv", "scale", "SCB")  # that stand beside one-byte codes
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
# Where older tools put the quantization_config, and the method that such a file means when it names none.
_CONFIG_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


class SafetensorsCheckpoint(Checkpoint):
    """A directory with config.json and safetensors shards, or one .safetensors file (config.json beside it)."""

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.source = source
        self.config, self.quantization_config = _read_config(path)
        files, index = _shards(path) if path.is_dir() else ([path], {})
        self._stored = _read_headers(files)
        _check_index(path, index, self._stored)
        self.tensors = {
            name: TensorInfo(name, tensor.dtype, tensor.shape, file, tensor.nbytes, tensor.begin)
            for name, (file, tensor) in self._stored.items()
        }

    @cached_property
    def format(self) -> Format | None:
        if self.quantization_config is None:
            return None
        from aphroquant.formats import detect_format

        with naming(self.path):
            return detect_format(self.quantization_config).from_config(self.quantization_config)

    @property
    def format_name(self) -> str:
        return self.format.name if self.format else "dense"

    def read(self, name: str) -> Tensor:
        info = self.info(name)
        tensor = self._stored[name][1]
        return as_tensor(read_bytes(info.file, name, tensor.begin, tensor.nbytes), tensor.dtype, tensor.shape)

    def read_pieces(self, name: str) -> Iterator[Tensor]:
        info = self.info(name)
        _, _, begin, nbytes = self._stored[name][1]
        size = PIECE_ELEMENTS * info.dtype.itemsize
        for offset in range(0, nbytes, size):
            buffer = read_bytes(info.file, name, begin + offset, min(size, nbytes - offset))
            yield buffer.view(info.dtype)

    def _read_part(self, name: str, entry: int | None) -> Tensor:
        """A stored tensor, or one entry along its first dimension, without reading the others."""
        if entry is None:
            return self.read(name)
        tensor = self._stored[name][1]
        nbytes = tensor.nbytes // tensor.shape[0]
        buffer = read_bytes(self.info(name).file, name, tensor.begin + entry * nbytes, nbytes)
        return as_tensor(buffer, tensor.dtype, tensor.shape[1:])

    def _parts(self, name: str) -> list[Part]:
        """What a stored tensor holds, as the format sees it."""
        if self.format is None:
            return [Part(name.rpartition(".")[0], suffix(name))]
        info = self.tensors[name]
        with naming(self.path):
            return self.format.locate(name, TensorHeader(info.dtype, info.shape))

    def _modules_of(self, name: str) -> set[str]:
        return {part.module for part in self._parts(name)}

    @cached_property
    def _modules(self) -> dict[str, dict[str, TensorHeader]]:
        """Module -> suffix -> header, for modules that have a tensor of two or more dimensions."""
        modules: dict[str, dict[str, TensorHeader]] = {}
        for name, info in self.tensors.items():
            if suffix(name) not in COMPANIONS:
                for module, part, entry in self._parts(name):
                    shape = info.shape if entry is None else info.shape[1:]
                    modules.setdefault(module, {})[part] = TensorHeader(info.dtype, shape)
        return {
            module: headers
            for module, headers in modules.items()
            if any(len(header.shape) >= 2 for header in headers.values())
        }

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        schemes: dict[str, Scheme] = {}
        for module, headers in self._modules.items():
            self._check_one_weight(module, headers)
            with naming(self.path):
                scheme = self.format.scheme(module, headers) if self.format else None
            if scheme is None and "weight" in headers and len(headers["weight"].shape) == 2:
                self._check_dense(module, headers)
                scheme = DenseScheme(headers["weight"].dtype)
            if scheme is not None:
                if not isinstance(scheme, DenseScheme):
                    self._check_known(module, headers)
                schemes[module] = scheme
        return schemes

    def _check_one_weight(self, module: str, headers: Mapping[str, TensorHeader]) -> None:
        """Refuse a module that is there twice: nothing tells which of the two the model is to use."""
        codes = next((name for name in _CODES if name in headers), None)
        if "weight" in headers and codes is not None:
            raise InputError(
                f"{self.path}: {module} is stored twice, as {module}.weight and as {module}.{codes}",
                hint="remove the one that does not belong to the model",
            )

    def _check_known(self, module: str, headers: Mapping[str, TensorHeader]) -> None:
        """Refuse what the format knows nothing of: left out in silence, the layer might compute something else."""
        assert self.format is not None
        unknown = [name for name in sorted(headers) if not self.format.knows(name)]
        if unknown:
            raise InputError(
                f"{self.path}: {module}.{unknown[0]} is no part of a layer that {self.format.name} has quantized",
                hint="nothing says what it does to the layer; remove it if that is nothing",
            )

    def _check_dense(self, module: str, headers: Mapping[str, TensorHeader]) -> None:
        """Refuse codes that nothing says the meaning of: read as numbers they would give a wrong model."""
        dtype = headers["weight"].dtype
        scales = [name for name in _SCALES if f"{module}.{name}" in self.tensors]
        if not dtype.is_floating_point or (dtype.itemsize == 1 and (scales or self.format is not None)):
            found = str(dtype).removeprefix("torch.") + (f" beside {scales[0]}" if scales else "")
            raise InputError(
                f"{self.path}: {module}.weight is {found}, but config.json does not say how it is quantized",
                hint="quantization_config is missing, or leaves this module out; copy config.json from the source",
            )

    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    def weight(self, module: str) -> QuantizedWeight:
        return self.fetched(module)()

    def fetched(self, module: str) -> Callable[[], QuantizedWeight]:
        scheme = self._schemes.get(module)
        if scheme is None:
            raise InputError(f"{self.path}: there is no weight of a module {module!r}")
        if isinstance(scheme, DenseScheme) or self.format is None:
            return partial(QuantizedWeight.dense, self.read(f"{module}.weight"))
        stored = {name: self._read_part(*self.format.place(module, name)) for name in self._modules[module]}
        return partial(self._decoded, self.format, module, stored)

    def _decoded(self, held: Format, module: str, stored: Mapping[str, Tensor]) -> QuantizedWeight:
        with naming(self.path):
            weight = held.read(module, stored)
            weight.check(module)
        return weight

    def weight_pieces(self, module: str, max_elements: int = PIECE_ELEMENTS) -> Iterator[QuantizedWeight]:
        if not isinstance(self._schemes.get(module), DenseScheme):
            yield from super().weight_pieces(module, max_elements)
            return
        name = f"{module}.weight"
        info, stored = self.info(name), self._stored[name][1]
        rows, columns = info.shape
        size = rows_per_piece(columns, max_elements)
        for start in range(0, rows, size):
            shape = (min(size, rows - start), columns)
            nbytes = shape[0] * columns * info.dtype.itemsize
            buffer = read_bytes(info.file, name, stored.begin + start * columns * info.dtype.itemsize, nbytes)
            yield QuantizedWeight.dense(as_tensor(buffer, info.dtype, shape))

    def _settings_files(self) -> list[Path]:
        index = _index_file(self.path) if self.path.is_dir() else None
        known = [self.directory / name for name in ("config.json", *_CONFIG_FILES)]
        return [path for path in (*known, index) if path is not None and path.is_file()]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.directory)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json without what is quantization's or would be run, and the quantization_config."""
    directory = path if path.is_dir() else path.parent
    if path.is_file() and not (directory / "config.json").exists():
        return {}, None  # a lone file: its tensors can be read, its model is unknown
    if not (directory / "config.json").exists():
        raise _no_config(directory)
    config = read_json(directory / "config.json")
    config.pop("auto_map", None)
    older = config.pop("compression_config", None)  # what compressed-tensors called it; both may be there
    found = config.pop("quantization_config", None) or older
    for name, method in _CONFIG_FILES.items():
        if found is None and (directory / name).exists():
            found = {"quant_method": method, **read_json(directory / name)}
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{directory / 'config.json'}: quantization_config must be an object")
    return config, found


def is_one_of_several(path: Path) -> bool:
    """Whether this is a single shard of a checkpoint, by its name."""
    return path.is_file() and _SHARD_NAME.fullmatch(path.name) is not None


def _no_config(directory: Path) -> InputError:
    """What a directory that is no checkpoint is more likely to be."""
    entries = sorted(directory.iterdir())
    gguf = [path for path in entries if path.suffix == ".gguf"]
    models = [path for path in entries if (path / "config.json").is_file()]
    if not entries:
        return InputError(f"{directory}: is an empty directory")
    if gguf:
        hint = f"give the file itself: {gguf[0]}"
    elif models:
        hint = f"did you mean {models[0]}?"
    else:
        hint = "give the directory that holds the model's config.json and its .safetensors files"
    return InputError(f"{directory}: there is no config.json, so that it is no checkpoint", hint=hint)


def _shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a directory and, where an index names them, tensor -> file name."""
    single = directory / SINGLE_FILE
    if single.exists():
        return [single], {}
    index = _index_file(directory)
    if index is not None:
        weight_map = _weight_map(index)
        return [directory / name for name in sorted(set(weight_map.values()))], weight_map
    files = sorted(directory.glob("*.safetensors"))
    if len(files) > 1:  # Mistral's own copy of the same weights is called consolidated
        files = [file for file in files if not file.name.startswith("consolidated")]
    if not files:
        raise _no_weights(directory)
    _check_shard_names(directory, files)
    return files, {}


def _index_file(directory: Path) -> Path | None:
    found = sorted(directory.glob("*" + _INDEX_SUFFIX))
    if len(found) > 1:
        found = [path for path in found if path.name == INDEX_FILE] or found
    if len(found) > 1:
        raise InputError(f"{directory}: several index files: {', '.join(path.name for path in found)}")
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: {name}: {file!r} must be the name of a .safetensors file in the same directory")
        if not (index.parent / file).is_file():
            raise InputError(
                f"{index}: {name}: the file {file} is missing",
                hint="the download is incomplete; fetch the missing shard",
            )
    return weight_map


def _no_weights(directory: Path) -> InputError:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return InputError(
            f"{directory}: the weights are pickles ({pickles[0]}), which can run code when loaded and are not read",
            hint="save it as safetensors: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    gguf = sorted(path.name for path in directory.glob("*.gguf"))
    hint = f"give the file itself: {directory / gguf[0]}" if gguf else None
    return InputError(f"{directory}: there are no .safetensors files", hint=hint)


def _check_shard_names(directory: Path, files: list[Path]) -> None:
    """Without an index, the names themselves say how many shards there should be."""
    for match in (_SHARD_NAME.fullmatch(file.name) for file in files):
        if match is None:
            continue
        for number in range(1, int(match[3]) + 1):
            expected = f"{match[1]}-{number:05d}-of-{match[3]}.safetensors"
            if not (directory / expected).exists():
                raise InputError(f"{directory}: {expected} is missing", hint="the download is incomplete")


def _read_headers(files: list[Path]) -> dict[str, tuple[Path, StoredTensor]]:
    stored: dict[str, tuple[Path, StoredTensor]] = {}
    for file in files:
        for name, tensor in read_header(file).tensors.items():
            if name in stored:
                raise InputError(f"{file}: {name} is also stored in {stored[name][0].name}")
            stored[name] = (file, tensor)
    return stored


def _check_index(directory: Path, index: Mapping[str, str], stored: Mapping[str, tuple[Path, StoredTensor]]) -> None:
    for name, file in index.items():
        if name not in stored or stored[name][0].name != file:
            raise InputError(f"{directory / file}: the index promises {name} in this file, and it is not there")
