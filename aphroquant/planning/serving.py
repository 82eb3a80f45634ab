"""What a model needs on GPUs when it is served: weights, tokens of KV cache, and layers that do not divide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from aphroquant.models.spec import DOWN, DecoderSpec, O
from aphroquant.planning.gpus import Gpu
from aphroquant.schemes import FloatScheme, IntegerScheme, Scheme

USED_SHARE = 0.9  # of the memory; what vLLM and SGLang take of it by default
WORKSPACE_BYTES = 2 * 2**30  # activations, graphs and the CUDA context of a rank
KV_BYTES = {"16 bit": 2, "fp8": 1}
_PACKED_ROWS = 8  # output channels of a 4-bit word, as AWQ and Marlin's tiles have them


class Capacity(NamedTuple):
    """On one kind of GPU, `ranks` of them together. `kv_tokens` by the cache's number format; 0: it does not fit.

    `tokens_per_second` is what the memory's bandwidth allows a single request at most.
    """

    gpu: str
    ranks: int
    weight_bytes: int
    kv_tokens: dict[str, int]
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        return any(self.kv_tokens.values())


def capacity(spec: DecoderSpec, num_bytes: int, gpu: Gpu, ranks: int) -> Capacity:
    """For a model whose tensors have `num_bytes`, divided evenly among `ranks`."""
    weights = -(-num_bytes // ranks)
    left = gpu.memory_bytes * USED_SHARE - weights - WORKSPACE_BYTES
    heads = max(1, spec.num_kv_heads // ranks)  # fewer heads than ranks are repeated
    vectors = 2 * spec.num_layers * heads * spec.head_dim
    tokens = {name: max(0, int(left // (vectors * size))) for name, size in KV_BYTES.items()}
    return Capacity(gpu.name, ranks, weights, tokens, gpu.bandwidth * 1e9 / weights)


def undivided(
    spec: DecoderSpec, modules: Mapping[str, tuple[int, int]], schemes: Mapping[str, Scheme], ranks: int
) -> list[str]:
    """Why the model cannot be divided among so many ranks, one sentence a reason; the same of many layers once."""
    if ranks == 1:
        return []
    found: dict[str, list[str]] = {}
    for module, shape in modules.items():
        for reason in _reasons(module, shape, schemes[module], ranks):
            found.setdefault(reason, []).append(module)
    told = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in found.items()
    ]
    return [*_heads(spec, ranks), *told]


def _heads(spec: DecoderSpec, ranks: int) -> Iterator[str]:
    if spec.num_heads % ranks:
        yield f"{spec.num_heads} attention heads are no multiple of {ranks} ranks"
    if spec.num_kv_heads % ranks and ranks % spec.num_kv_heads:
        yield f"{spec.num_kv_heads} heads of keys and values neither divide {ranks} ranks nor are divided by them"
    if spec.vocab_size % ranks:
        yield f"{spec.vocab_size} tokens of vocabulary are no multiple of {ranks} ranks (engines that pad take it)"


def _reasons(module: str, shape: tuple[int, int], scheme: Scheme, ranks: int) -> Iterator[str]:
    """o and down are divided by their inputs, all others by their outputs."""
    rows, columns = shape
    by_inputs = module.endswith((O, DOWN, ".w2"))
    length, kind = (columns, "inputs") if by_inputs else (rows, "outputs")
    if length % ranks:
        yield f"{length} {kind} are no multiple of {ranks} ranks"
        return
    part, unit = length // ranks, _unit(scheme, by_inputs)
    if part % unit:
        yield f"a rank's {part} of {length} {kind} are no multiple of {unit} ({scheme})"


def _unit(scheme: Scheme, by_inputs: bool) -> int:
    """What must stay together along the divided side: groups, blocks of scales, packed words."""
    if isinstance(scheme, FloatScheme) and scheme.block_shape is not None:
        return scheme.block_shape[1 if by_inputs else 0]
    if isinstance(scheme, IntegerScheme):
        return (scheme.group_size or 1) if by_inputs else _PACKED_ROWS
    size = getattr(scheme, "block_size", None)
    return size if by_inputs and isinstance(size, int) else 1
