"""What is wrong with a checkpoint that can be read: each problem one sentence, alike ones in all layers told once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aphroquant.checkpoint.base import COMPANIONS, Checkpoint, is_kv_scale, suffix
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.errors import InputError
from aphroquant.models.spec import LM_HEAD, DecoderSpec
from aphroquant.numbers import is_finite
from aphroquant.schemes import DenseScheme

SAMPLED_MODULES = 24
MAX_SAMPLED_BYTES = 2**28  # a larger matrix is not read for a look at its values
MAX_VECTOR = 2**22  # bytes
QUANTIZED_SUFFIXES = ("qweight", "weight_packed", "codes", "weight_scale", "weight_scale_inv")
_HARMLESS = ("rotary_emb.inv_freq",)  # computed from the config; older files store it
_LAYER = re.compile(r"\.\d+\.", re.ASCII)


def find_problems(checkpoint: Checkpoint) -> list[str]:
    """Everything suspicious; empty for a sound checkpoint."""
    problems = _quantization_problems(checkpoint)
    try:
        spec = checkpoint.spec
    except InputError as error:
        problems.append(error.message)
    else:
        problems += [*_missing(checkpoint, spec), *_unexpected(checkpoint, spec), *_wrong_shapes(checkpoint, spec)]
    problems += [*_value_problems(checkpoint), *_kv_scale_problems(checkpoint)]
    return [*problems, *tokenizer_problems(checkpoint)]


def _quantization_problems(checkpoint: Checkpoint) -> list[str]:
    quantized = any(not isinstance(scheme, DenseScheme) for scheme in checkpoint.schemes().values())
    if checkpoint.quantization_config is not None and not quantized:
        method = checkpoint.quantization_config.get("quant_method")
        return [f"the config has a quantization_config ({method}), but no weight is quantized"]
    if checkpoint.format_name == "dense":
        names = [name for name in checkpoint.tensors if suffix(name) in QUANTIZED_SUFFIXES]
        return [f"{line} is stored, but the config has no quantization_config" for line in _collapsed(names)]
    return []


def _missing(checkpoint: Checkpoint, spec: DecoderSpec) -> list[str]:
    schemes = checkpoint.schemes()
    missing = [f"{module}.weight" for module in expected_modules(spec) if module not in schemes]
    missing += [name for name in expected_vectors(spec) if name not in checkpoint.tensors]
    return [f"{line} is missing" for line in _collapsed(missing)]


def _unexpected(checkpoint: Checkpoint, spec: DecoderSpec) -> list[str]:
    names = unexpected_names(checkpoint.tensors, spec)
    problems = [f"{line} belongs to no part of a {spec.family} model" for line in _collapsed(names)]
    if spec.tie_word_embeddings and LM_HEAD in checkpoint.schemes():
        problems.append("lm_head.weight is stored although the config ties it to the embedding")
    return problems


def unexpected_names(names: Iterable[str], spec: DecoderSpec) -> list[str]:
    """Those of the stored tensors that a model of this shape has no place for."""
    modules, vectors = expected_modules(spec), expected_vectors(spec)

    def known(name: str) -> bool:
        module, inner, _ = name.partition(".weight.")  # bitsandbytes: P.weight.quant_state.bitsandbytes__nf4
        if not inner:
            module = name.rpartition(".")[0]
        if suffix(name) == "bias":
            return name in vectors
        scales_of_attention = module.endswith(".self_attn") and suffix(name) in COMPANIONS
        return name in vectors or module in modules or module == LM_HEAD or scales_of_attention

    return [name for name in names if not known(name) and not name.endswith(_HARMLESS)]


def _wrong_shapes(checkpoint: Checkpoint, spec: DecoderSpec) -> list[str]:
    """Dense weights and vectors, from their headers; quantized weights are checked when sampled."""
    expected: dict[str, list[int]] = {name: [length] for name, length in expected_vectors(spec).items()}
    expected |= {f"{module}.weight": list(shape) for module, shape in expected_modules(spec).items()}
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is not None and list(info.shape) != shape:
            wrong[str(list(info.shape)), str(shape)].append(name)
    return [
        f"{line} has shape {found}, and the config wants {wanted}"
        for (found, wanted), names in wrong.items()
        for line in _collapsed(names)
    ]


def _value_problems(checkpoint: Checkpoint) -> list[str]:
    problems = [f"{line} holds NaN or infinite values" for line in _collapsed(_odd_vectors(checkpoint))]
    for module in _sample(checkpoint):
        try:
            weight = checkpoint.weight(module)
        except InputError as error:
            problems.append(error.message)
            continue
        problems += [f"{module}: {problem}" for problem in _odd_values(weight.tensors)]
        try:
            wanted = expected_modules(checkpoint.spec).get(module)
        except InputError:
            wanted = None  # told by find_problems
        if wanted is not None and weight.shape != wanted and not isinstance(weight.scheme, DenseScheme):
            problems.append(f"{module} holds a weight {list(weight.shape)}, and the config wants {list(wanted)}")
    return problems


def _odd_vectors(checkpoint: Checkpoint) -> list[str]:
    """Norms, biases and other small tensors that hold something else than numbers."""
    names = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 1 and info.nbytes <= MAX_VECTOR]
    dense = set(checkpoint.dense_names())
    return [name for name in names if name in dense and not is_finite(checkpoint.read(name)) and not is_kv_scale(name)]


def _odd_values(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.numel() == 0:
            continue
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            problems.append(f"{bad} of {tensor.numel()} values of {name} are NaN or infinite")
        elif name == "weight" and not tensor.float().any():
            problems.append("all values of the weight are zero")
    return problems


def _kv_scale_problems(checkpoint: Checkpoint) -> list[str]:
    def sound(name: str) -> bool:
        scale = checkpoint.read(name).float()
        return bool((torch.isfinite(scale) & (scale > 0)).all())

    names = [name for name in checkpoint.tensors if is_kv_scale(name) and not sound(name)]
    return [f"{line} is not a positive number" for line in _collapsed(names)]


def _sample(checkpoint: Checkpoint) -> list[str]:
    """Some modules of every role, the first and the last layer among them."""
    by_role: dict[str, list[str]] = defaultdict(list)
    for module, num_bytes in checkpoint.module_bytes().items():
        if num_bytes <= MAX_SAMPLED_BYTES:
            by_role[_LAYER.sub(".*.", module, count=1)].append(module)
    chosen = [modules[0] for modules in by_role.values()] + [modules[-1] for modules in by_role.values()]
    return list(dict.fromkeys(chosen))[:SAMPLED_MODULES]


def tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    """What is missing, or does not fit the model's vocabulary."""
    try:
        tokenizer = checkpoint.tokenizer()
    except InputError as error:
        return [error.message]
    problems = []
    if not tokenizer.chat_template:
        problems.append("the tokenizer has no chat template")
    rows = checkpoint.config.get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, and the embedding {rows} rows")
    return problems


def _collapsed(names: Iterable[str]) -> list[str]:
    """Names with the same role as one: "model.layers.*.mlp.up_proj.weight (30 layers)"."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_LAYER.sub(".*.", name, count=1)].append(name)
    return [members[0] if len(members) == 1 else f"{role} ({len(members)} layers)" for role, members in groups.items()]
