"""What headers and configuration say of each other: nothing here reads a tensor's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.base import read_json, suffix
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.checkpoint.problems import QUANTIZED_SUFFIXES, tokenizer_problems, unexpected_names
from aphroquant.errors import InputError
from aphroquant.inspection.findings import Finding, Severity
from aphroquant.models.spec import GATE, UP, DecoderSpec, K, Q, V
from aphroquant.provenance.records import CARD, OutputRecord
from aphroquant.provenance.verification import verify_files
from aphroquant.schemes import DenseScheme, Scheme

FUSED = ((Q, K, V), (GATE, UP))
INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_DAMAGED = "it was changed or damaged after it was written: get it again"
_INCOMPLETE = "the download is incomplete, or config.json belongs to another model"


def structure_findings(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Tensors missing, too many or of the wrong shape, layers that engines cannot fuse, files that disagree."""
    yield from _config_findings(checkpoint, schemes)
    try:
        spec = checkpoint.spec
    except InputError as error:
        advice = "its tensors are checked, but not whether they are all there"
        yield Finding("info", "unknown-model", "model_type", error.message, advice, _CONFIG)
    else:
        yield from _missing(checkpoint, schemes, spec)
        yield from _unexpected(checkpoint, spec)
        yield from _wrong_shapes(checkpoint, spec)
        if checkpoint.format_name != "gguf":
            yield from _unfusable(checkpoint, schemes, spec)
    if checkpoint.path.is_dir():
        yield from _index_findings(checkpoint)
        yield from _stray_files(checkpoint)
    for problem in tokenizer_problems(checkpoint):
        severe = "chat template" not in problem
        yield Finding("warning" if severe else "info", "tokenizer", "tokenizer", problem, "", "")


def manifest_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Files that are not those of aphroquant.json and the check sums. Reads every file that they name."""
    if not OutputRecord(checkpoint.path).exists:
        return
    for difference in verify_files(checkpoint.path).differences:
        if difference.kind != "extra":
            advice = _INCOMPLETE if difference.kind == "missing" else _DAMAGED
            severity: Severity = "info" if difference.file == CARD else "error"  # the card is anybody's to edit
            check = f"file-{difference.kind}"
            yield Finding(severity, check, difference.file, difference.message, advice, difference.file)


def _config_findings(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> Iterator[Finding]:
    quantized = any(not isinstance(scheme, DenseScheme) for scheme in schemes.values())
    if checkpoint.quantization_config is not None and not quantized:
        method = checkpoint.quantization_config.get("quant_method")
        message = f"describes {method}, but no weight is quantized"
        advice = "remove quantization_config, or get the quantized weights"
        yield Finding("error", "config-without-weights", "quantization_config", message, advice, _CONFIG)
    if checkpoint.format_name == "dense":
        for name, info in checkpoint.tensors.items():
            if suffix(name) in QUANTIZED_SUFFIXES:
                advice = "config.json has lost its quantization_config: get it again"
                message = "is stored, but the config has no quantization_config"
                yield Finding("error", "weights-without-config", name, message, advice, info.file.name)


def _missing(checkpoint: Checkpoint, schemes: Mapping[str, Scheme], spec: DecoderSpec) -> Iterator[Finding]:
    missing = [f"{module}.weight" for module in expected_modules(spec) if module not in schemes]
    missing += [name for name in expected_vectors(spec) if name not in checkpoint.tensors]
    for name in missing:
        yield Finding("error", "missing", name, f"is missing, and a {spec.family} model needs it", _INCOMPLETE, "")


def _unexpected(checkpoint: Checkpoint, spec: DecoderSpec) -> Iterator[Finding]:
    for name in unexpected_names(checkpoint.tensors, spec):
        message = f"belongs to no part of a {spec.family} model of {spec.num_layers} layers"
        file = checkpoint.tensors[name].file.name
        yield Finding("warning", "unexpected", name, message, "readers leave it out", file)


def _wrong_shapes(checkpoint: Checkpoint, spec: DecoderSpec) -> Iterator[Finding]:
    expected: dict[str, tuple[int, ...]] = {name: (length,) for name, length in expected_vectors(spec).items()}
    dense = {module for module, scheme in checkpoint.schemes().items() if isinstance(scheme, DenseScheme)}
    expected |= {f"{module}.weight": shape for module, shape in expected_modules(spec).items() if module in dense}
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is not None and info.shape != shape:
            message = f"has shape {list(info.shape)}, and the config wants {list(shape)}"
            advice = "config.json and the weights are of different models"
            yield Finding("error", "wrong-shape", name, message, advice, info.file.name)


def _unfusable(checkpoint: Checkpoint, schemes: Mapping[str, Scheme], spec: DecoderSpec) -> Iterator[Finding]:
    """Layers that engines multiply as one and that are quantized differently."""
    for layer in range(spec.num_layers):
        for linears in FUSED:
            modules = [f"{spec.block_prefix(layer)}.{linear}" for linear in linears]
            found = {str(schemes[module]) for module in modules if module in schemes}
            if len(found) > 1:
                names = ", ".join(linear.rpartition(".")[2] for linear in linears)
                told = "; ".join(sorted(found))
                message = f"{names} are quantized differently ({told})"
                advice = "engines that fuse them (vLLM, SGLang, Aphrodite) refuse such a layer: give them one scheme"
                yield Finding("warning", "unfusable", modules[0], message, advice, "")


def _index_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    path = checkpoint.path / INDEX
    if not path.exists():
        return
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or (checkpoint.path / "model.safetensors").exists():
        message = "stands beside model.safetensors, which readers take instead of the shards"
        yield Finding("warning", "index-unused", INDEX, message, "remove what does not belong to the model", INDEX)
        return
    for name, info in checkpoint.tensors.items():
        if name not in weight_map:
            message = f"is stored in {info.file.name}, but {INDEX} does not name it"
            advice = "readers that go by the index leave it out: write the index again"
            yield Finding("error", "not-in-index", name, message, advice, info.file.name)
    total = _metadata_size(index)
    if total is not None and total != checkpoint.num_bytes:
        message = f"metadata.total_size is {total}, and the tensors have {checkpoint.num_bytes} bytes"
        yield Finding("info", "index-size", INDEX, message, "no reader depends on it", INDEX)


def _metadata_size(index: Mapping[str, Any]) -> int | None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if isinstance(total, int) else None


def _stray_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    used = {info.file.name for info in checkpoint.tensors.values()}
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        if path.name not in used and not path.name.startswith("consolidated"):
            message = "is not part of the checkpoint: no index names it"
            yield Finding("warning", "stray-file", path.name, message, "remove it, or write the index again", path.name)
