"""The whole decoder forward in one call of the compiled library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import byref, pointer
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.kv_cache import KVCache
from aphroquant.errors import UsageError
from aphroquant.kernels.cpu.abi import CACHE_TYPES, DecoderStruct, LayerStruct, LinearStruct, address, aligned_bytes
from aphroquant.kernels.cpu.batch import batch_struct
from aphroquant.kernels.cpu.grouped import GroupedWeight, grouped, join
from aphroquant.kernels.cpu.inputs import InputSettings, input_settings, unsupported
from aphroquant.kernels.cpu.library import library, obstacle
from aphroquant.kernels.cpu.packing import pack
from aphroquant.kernels.cpu.rope_table import RopeTable
from aphroquant.models.loader import load_block, load_final_norm
from aphroquant.models.spec import (
    DOWN,
    EMBEDDING,
    GATE,
    INPUT_NORM,
    K_NORM,
    LM_HEAD,
    POST_ATTENTION_NORM,
    Q_NORM,
    UP,
    DecoderSpec,
    K,
    O,
    Q,
    V,
)  # fmt: skip
from aphroquant.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from aphroquant.checkpoint import Checkpoint


class _Linear(NamedTuple):
    codes: GroupedWeight
    settings: InputSettings
    bias: Tensor | None

    def joins(self, other: _Linear) -> bool:
        """Whether one struct can hold both."""
        same_input = self.settings == other.settings and (self.bias is None) == (other.bias is None)
        return same_input and self.codes.joins(other.codes)


class NativeDecoder:
    """Packed weights and a forward over a paged KV cache.

    A row's logits depend on its own sequence alone: not on the batch, on the chunks of a prompt, or on threads.
    """

    @staticmethod
    def supports(spec: DecoderSpec, schemes: Mapping[str, Scheme]) -> str | None:
        """None if the compiled decoder can run the model, else why not."""
        if reason := obstacle():
            return reason
        if spec.head_dim % 2:
            return f"head_dim {spec.head_dim} is odd"
        if spec.experts is not None:
            return "the compiled decoder has no experts"
        modules = [*spec.modules(), EMBEDDING, LM_HEAD]
        reasons = (unsupported(schemes[module]) for module in modules if module in schemes)
        return next((reason for reason in reasons if reason), None)

    def __init__(
        self, checkpoint: Checkpoint, kv_cache: KVCache, *, activations: str = "int8", num_threads: int | None = None
    ) -> None:
        if reason := self.supports(checkpoint.spec, checkpoint.schemes()):
            raise UsageError(f"the compiled decoder cannot run {checkpoint.source}: {reason}")
        if activations not in ("int8", "float"):
            raise UsageError(f"activations = {activations!r} must be int8 or float")
        self.spec, self._cache, self._activations = checkpoint.spec, kv_cache, activations
        self._num_threads = num_threads
        self._tensors: list[Tensor] = []  # what the structs point to
        self._layers = (LayerStruct * self.spec.num_layers)()
        for layer in range(self.spec.num_layers):
            self._load_layer(checkpoint, layer)
        self._embedding, self._head = self._load_vocabulary(checkpoint)
        self._struct = self._decoder_struct(load_final_norm(checkpoint))
        self._rope = RopeTable(self.spec)
        self._workspace = aligned_bytes(0)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Store the tokens' keys and values; float32 logits [len(batch.logits_rows), V]."""
        positions = batch.positions.numpy()
        cos, sin = self._rope(int(positions.max(initial=0)))
        cache = self._cache
        struct = batch_struct(
            batch,
            vocab_size=self.spec.vocab_size,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            cos=cos,
            sin=sin,
        )
        logits = torch.empty(struct.num_logits, self.spec.vocab_size)
        if struct.num_tokens == 0:
            return logits
        num_threads = self._num_threads or torch.get_num_threads()
        num_bytes = library().aq_decoder_workspace(byref(self._struct), byref(struct), num_threads)
        if self._workspace.numel() < num_bytes:
            self._workspace = aligned_bytes(num_bytes)
        library().aq_decoder_forward(
            byref(self._struct), byref(struct), logits.data_ptr(), self._workspace.data_ptr(), num_threads
        )
        return logits

    def _load_layer(self, checkpoint: Checkpoint, layer: int) -> None:
        found: dict[str, _Linear] = {}

        def keep(name: str, weight: QuantizedWeight, bias: Tensor | None) -> _NotCalled:
            found[name.removeprefix(f"{self.spec.block_prefix(layer)}.")] = self._linear(weight, bias)
            return _NotCalled()

        norms = load_block(checkpoint, layer, make_linear=keep).norms
        struct = self._layers[layer]
        struct.input_norm = self._keep(norms[INPUT_NORM])
        struct.post_attention_norm = self._keep(norms[POST_ATTENTION_NORM])
        if self.spec.qk_norm:
            struct.q_norm, struct.k_norm = self._keep(norms[Q_NORM]), self._keep(norms[K_NORM])
        struct.num_qkv = self._fill(struct.qkv, [found[Q], found[K], found[V]])
        struct.num_gate_up = self._fill(struct.gate_up, [found[GATE], found[UP]])
        struct.o, struct.down = self._pack([found[O]]), self._pack([found[DOWN]])
        cache = self._cache.layer(layer)
        struct.keys, struct.values = cache.keys.data_ptr(), cache.values.data_ptr()
        struct.key_scales, struct.value_scales = address(cache.key_scales), address(cache.value_scales)
        struct.sliding_window = self.spec.sliding_windows[layer] or 0

    def _linear(self, weight: QuantizedWeight, bias: Tensor | None = None) -> _Linear:
        codes = grouped(weight)
        return _Linear(codes, input_settings(weight, codes, self._activations), bias)

    def _fill(self, structs: Sequence[LinearStruct], linears: list[_Linear]) -> int:
        """Pack linears that read the same input, as one if they can be joined. Returns how many structs are filled."""
        joined = all(linears[0].joins(other) for other in linears[1:])
        packed = [self._pack(linears)] if joined else [self._pack([linear]) for linear in linears]
        for index, struct in enumerate(packed):
            structs[index] = struct  # type: ignore[index]  # a ctypes array
        return len(packed)

    def _pack(self, linears: list[_Linear]) -> LinearStruct:
        settings = linears[0].settings
        biases = [linear.bias for linear in linears if linear.bias is not None]
        packed = pack(
            join([linear.codes for linear in linears]),
            torch.cat(biases) if biases else None,
            max_chunk=settings.max_chunk,
        )
        settings.fill(packed.struct)
        self._tensors += packed.tensors
        return packed.struct

    def _load_vocabulary(self, checkpoint: Checkpoint) -> tuple[LinearStruct, LinearStruct]:
        """Embedding and head; one and the same where they are tied."""
        schemes, tied = checkpoint.schemes(), self.spec.tie_word_embeddings
        embedding = EMBEDDING if EMBEDDING in schemes or not tied else LM_HEAD
        head = LM_HEAD if LM_HEAD in schemes or not tied else EMBEDDING
        packed = self._vocabulary_matrix(checkpoint, embedding)
        return packed, packed if head == embedding else self._vocabulary_matrix(checkpoint, head)

    def _vocabulary_matrix(self, checkpoint: Checkpoint, module: str) -> LinearStruct:
        linear = self._linear(checkpoint.weight(module))
        if linear.codes.kind == "fp8":  # looked up row by row, which FP8 blocks are not laid out for
            linear = self._linear(QuantizedWeight.dense(checkpoint.weight(module).dequantize()))
        return self._pack([linear])

    def _decoder_struct(self, final_norm: Tensor) -> DecoderStruct:
        spec, cache = self.spec, self._cache
        return DecoderStruct(
            num_layers=spec.num_layers,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            block_size=cache.block_size,
            norm_eps=spec.norm_eps,
            softmax_scale=spec.head_dim**-0.5,
            key_type=CACHE_TYPES[cache.scheme.key.dtype],
            value_type=CACHE_TYPES[cache.scheme.value.dtype],
            layers=self._layers,
            embedding=pointer(self._embedding),
            head=pointer(self._head),
            final_norm=self._keep(final_norm),
        )

    def _keep(self, tensor: Tensor) -> int:
        self._tensors.append(tensor.float().contiguous())
        return self._tensors[-1].data_ptr()


class _NotCalled:
    """Stands where a block's linear would be: only the weights are wanted."""

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("the compiled decoder runs the whole block")
