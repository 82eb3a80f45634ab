"""A checkpoint seen through a rotation of its channels: the same function, other numbers, no operation added.

With h the hidden states between the blocks and R1 orthogonal, the model is written for h R1. RMSNorm divides by a
length that rotating leaves alone, once its gain is moved into what reads it. So embedding, o_proj and down_proj are
multiplied by R1 where they write to h; q, k, v, gate, up, routers and head, their columns multiplied by the gain,
where they read it; and the gains become 1. R2 does the same between v_proj and o_proj, within each head: attention
mixes tokens, not channels, and query heads that share a value head share its R2. A tied head has to be stored on its
own, because the final norm's gain belongs to it alone.

Tensors come out rotated when they are read, in the dtype they are stored in, so that solvers and writers know nothing
of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aphroquant.calibration.rotation import random_rotation
from aphroquant.checkpoint import Checkpoint
from aphroquant.checkpoint.expected import expected_modules, expected_vectors
from aphroquant.conversion.soundness import check_complete
from aphroquant.errors import UsageError
from aphroquant.formats.base import Format
from aphroquant.models.spec import (
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    INPUT_NORM,
    LM_HEAD,
    POST_ATTENTION_NORM,
    UP,
    DecoderSpec,
    K,
    O,
    Q,
    V,
)
from aphroquant.schemes import DenseScheme, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Whose blocks are h + attention(norm(h)), then h + mlp(norm(h)), with no other norm, scale or cap on the way.
ROTATABLE_FAMILIES = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"})
_HARMLESS = (".rotary_emb.inv_freq",)  # stored by older tools, read by none


class _Role(NamedTuple):
    """What a rotation does to a tensor. `gain` names the norm that its columns take in; `layer` is whose R2 counts."""

    layer: int = 0
    reads: bool = False  # columns by R1
    gain: str | None = None
    writes: bool = False  # rows by R1
    value_rows: bool = False
    value_columns: bool = False
    becomes_one: bool = False


class RotatedCheckpoint(Checkpoint):
    """`inner`, a dense checkpoint, rotated by matrices that `seed` decides. UsageError if that would not be exact."""

    def __init__(self, inner: Checkpoint, seed: int) -> None:
        check_complete(inner)
        check_rotatable(inner)
        self._inner = inner
        self.source, self.path, self.quantization_config = inner.source, inner.path, inner.quantization_config
        self.config = inner.config | {"tie_word_embeddings": False}
        self.unties = inner.spec.tie_word_embeddings and f"{LM_HEAD}.weight" not in inner.tensors
        self.tensors = {**inner.tensors}
        if self.unties:
            embedding = inner.tensors[f"{EMBEDDING}.weight"]
            self.tensors[f"{LM_HEAD}.weight"] = embedding._replace(name=f"{LM_HEAD}.weight")
        generator = torch.Generator().manual_seed(seed)
        spec = inner.spec
        self._states = random_rotation(spec.hidden_size, generator)
        self._values = [random_rotation(spec.head_dim, generator) for _ in range(spec.num_layers)]
        self._roles = _roles(spec)

    @property
    def description(self) -> str:
        """What a user should know of it."""
        own_head = "; the head, tied to the embedding in the source, is stored on its own" if self.unties else ""
        return f"the channels are rotated: the same function in other numbers{own_head}"

    @property
    def format(self) -> Format | None:
        return self._inner.format

    @property
    def format_name(self) -> str:
        return self._inner.format_name

    def read(self, name: str) -> Tensor:
        tensor = self._inner.read(f"{EMBEDDING}.weight" if self.unties and name == f"{LM_HEAD}.weight" else name)
        role = self._roles.get(name)
        if role is None:
            return tensor
        if role.becomes_one:
            return torch.ones_like(tensor)
        return self._vector(tensor, role) if tensor.dim() == 1 else self._matrix(tensor, role)

    def schemes(self) -> Mapping[str, Scheme]:
        return self._schemes

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        schemes = dict(self._inner.schemes())
        if self.unties:
            schemes[LM_HEAD] = schemes[EMBEDDING]
        return schemes

    def weight(self, module: str) -> QuantizedWeight:
        return QuantizedWeight.dense(self.read(f"{module}.weight"))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._inner.tokenizer()

    def save_tokenizer(self, directory: Path) -> None:
        self._inner.save_tokenizer(directory)

    def carried_files(self) -> list[Path]:
        return self._inner.carried_files()

    def files(self) -> dict[str, Path]:
        return self._inner.files()

    def _matrix(self, matrix: Tensor, role: _Role) -> Tensor:
        """[N, K] as it is to be stored. What two rotations change is in float64 between them."""
        values = self._values[role.layer]
        work = matrix.double() if role.value_rows or role.value_columns else matrix
        if role.value_rows:
            columns = work.T  # a head's rows side by side
            work = values.columns(columns.reshape(-1, values.size)).reshape(columns.shape).T.contiguous()
        if role.value_columns:
            work = values.columns(work.reshape(-1, values.size)).reshape(work.shape)
        if role.reads:
            work = self._states.columns(work, None if role.gain is None else self._inner.read(role.gain))
        if role.writes:
            work = self._states.rows(work)
        return work.to(matrix.dtype)

    def _vector(self, bias: Tensor, role: _Role) -> Tensor:
        if role.writes:
            return self._states.columns(bias[None])[0]
        if role.value_rows:
            values = self._values[role.layer]
            return values.columns(bias.view(-1, values.size)).flatten()
        return bias


def check_rotatable(checkpoint: Checkpoint) -> None:
    """UsageError unless a rotation leaves the function of a checkpoint as it is."""
    spec, schemes = checkpoint.spec, checkpoint.schemes()
    if spec.family not in ROTATABLE_FAMILIES:
        raise UsageError(
            f"--rotate is not exact for model_type {spec.family}",
            hint=f"it is for {', '.join(sorted(ROTATABLE_FAMILIES))}",
        )
    quantized = next((module for module, scheme in schemes.items() if not isinstance(scheme, DenseScheme)), None)
    if quantized is not None or checkpoint.format_name != "dense":
        found = f"{quantized} is quantized already" if quantized else f"it is a {checkpoint.format_name} file"
        raise UsageError(
            f"{checkpoint.source}: {found}, and --rotate needs dense safetensors", hint="leave out --rotate"
        )
    known = {f"{module}.weight" for module in (*expected_modules(spec), LM_HEAD)} | set(expected_vectors(spec))
    known |= {f"{module}.bias" for module in spec.modules()}  # those that config.json does not give are zeros
    unknown = [name for name in checkpoint.tensors if name not in known and not name.endswith(_HARMLESS)]
    if unknown:
        raise UsageError(
            f"{checkpoint.source}: {unknown[0]} is no part of a plain {spec.family} model, so that nothing says what "
            "--rotate would have to do to it",
            hint="leave out --rotate",
        )


def _roles(spec: DecoderSpec) -> dict[str, _Role]:
    """The tensors that a rotation changes, by name."""
    final = f"{FINAL_NORM}.weight"
    roles = {
        f"{EMBEDDING}.weight": _Role(reads=True),  # its rows are hidden states
        f"{LM_HEAD}.weight": _Role(reads=True, gain=final),
        final: _Role(becomes_one=True),
    }
    for layer in range(spec.num_layers):
        prefix = spec.block_prefix(layer)
        attention, mlp = f"{prefix}.{INPUT_NORM}.weight", f"{prefix}.{POST_ATTENTION_NORM}.weight"
        roles |= {norm: _Role(becomes_one=True) for norm in (attention, mlp)}
        roles |= {f"{prefix}.{name}.weight": _Role(layer, reads=True, gain=attention) for name in (Q, K)}
        roles[f"{prefix}.{V}.weight"] = _Role(layer, reads=True, gain=attention, value_rows=True)
        roles[f"{prefix}.{V}.bias"] = _Role(layer, value_rows=True)
        roles[f"{prefix}.{O}.weight"] = _Role(layer, writes=True, value_columns=True)
        roles[f"{prefix}.{O}.bias"] = _Role(layer, writes=True)
        for gate, up, down in _mlps(spec, layer):
            roles |= {f"{prefix}.{name}.weight": _Role(layer, reads=True, gain=mlp) for name in (gate, up)}
            roles |= {f"{prefix}.{down}.{part}": _Role(layer, writes=True) for part in ("weight", "bias")}
        if spec.experts is not None and spec.has_experts(layer):
            roles[f"{prefix}.{spec.experts.router}.weight"] = _Role(layer, reads=True, gain=mlp)
    return roles


def _mlps(spec: DecoderSpec, layer: int) -> list[tuple[str, str, str]]:
    """The names of gate, up and down: of the MLP, or of every expert."""
    if spec.experts is None or not spec.has_experts(layer):
        return [(GATE, UP, DOWN)]
    return [spec.experts.expert(number) for number in range(spec.experts.num_experts)]
