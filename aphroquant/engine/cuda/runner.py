"""The runner on a GPU: decode steps replay captured graphs, all others run launch by launch."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aphroquant.engine.batch import ForwardBatch
from aphroquant.engine.cuda.buckets import batch_buckets, bucket_for
from aphroquant.engine.cuda.decoder import CudaDecoder
from aphroquant.engine.cuda.metadata import DecodeBuffers, StepInputs, is_decode_only, mixed_inputs
from aphroquant.engine.cuda.sampling import DeviceSampling
from aphroquant.engine.kv_cache import KVCache
from aphroquant.engine.sampling import RequestSampler
from aphroquant.kernels.cuda.attention.decode import DecodeWorkspace, num_splits
from aphroquant.kernels.cuda.host_copies import to_device

logger = logging.getLogger(__name__)

_CPU_MULTIPROCESSORS = 2  # where kernels are emulated


class CudaRunner:
    """A decoder and its KV cache. Logits stay on the device, and are good until the next forward."""

    def __init__(
        self, decoder: CudaDecoder, cache: KVCache, *, max_num_seqs: int, max_model_len: int, use_graphs: bool = True
    ) -> None:
        self._decoder, self._cache = decoder, cache
        self._buckets = batch_buckets(max_num_seqs)
        self._multiprocessors = _multiprocessors(decoder.device)
        parts = max(count * self._splits(count) for count in range(1, max_num_seqs + 1))
        self._workspace = DecodeWorkspace(decoder.shape, max_num_seqs, parts, decoder.device)
        table_width = -(-max_model_len // cache.block_size)
        self._buffers = DecodeBuffers(self._buckets[-1], table_width, decoder.device)
        self._steps: dict[int, _Step] = {}
        self._use_graphs = use_graphs and decoder.device.type == "cuda"
        self._prepare_all()

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Float32 logits [R, V] on the device."""
        bucket = bucket_for(batch.num_sequences, self._buckets) if is_decode_only(batch) else None
        if bucket is None:
            make_tiles = self._decoder.prefill_attention.tiles
            return self._run(mixed_inputs(batch, make_tiles, self._splits, self._decoder.device))
        self._buffers.fill(batch, bucket)
        logits = self._steps[bucket].run()[: batch.num_sequences]
        if batch.logits_rows.shape[0] == batch.num_sequences:
            return logits
        return logits[batch.logits_rows.to(logits.device)]

    @torch.inference_mode()
    def forward_ahead(self, batch: ForwardBatch, tokens: Tensor, rows: list[int]) -> Tensor:
        """As `forward` for one token a sequence, which is on the device only: sequence i has tokens[rows[i]]."""
        if len(rows) < tokens.shape[0]:
            tokens = tokens[to_device(torch.tensor(rows), tokens.device)]
        bucket = bucket_for(batch.num_sequences, self._buckets)
        if bucket is None:
            make_tiles = self._decoder.prefill_attention.tiles
            inputs = mixed_inputs(batch, make_tiles, self._splits, self._decoder.device)
            return self._run(replace(inputs, token_ids=tokens))
        self._buffers.fill(batch, bucket, tokens)
        return self._steps[bucket].run()[: batch.num_sequences]

    def begin_sampling(self, logits: Tensor, samplers: Sequence[RequestSampler]) -> DeviceSampling:
        """Tokens for logits that `forward` gave."""
        return DeviceSampling(logits, samplers)

    @torch.inference_mode()
    def _prepare_all(self) -> None:
        """Capture every batch size, the largest first: its memory then serves the others too."""
        started = time.monotonic()
        try:
            with _no_garbage_collection():
                for bucket in reversed(self._buckets):
                    self._prepare(bucket)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self._use_graphs:
                raise
            reason = str(error).splitlines()[0]
            logger.warning("decode steps run launch by launch, which is slow: they cannot be captured (%s)", reason)
            torch.cuda.synchronize()
            self._use_graphs = False
            self._steps.clear()
            for bucket in self._buckets:
                self._prepare(bucket)
            return
        logger.info("captured decode steps for %d batch sizes in %.1f s", len(self._steps), time.monotonic() - started)

    def _prepare(self, bucket: int) -> None:
        inputs = self._buffers.inputs(bucket, self._splits(bucket))
        pool = next((step.pool for step in self._steps.values()), None)
        self._steps[bucket] = _Step(lambda: self._run(inputs), captured=self._use_graphs, pool=pool)

    def _run(self, inputs: StepInputs) -> Tensor:
        return self._decoder.forward(inputs, self._cache, self._workspace)

    def _splits(self, num_sequences: int) -> int:
        return num_splits(num_sequences, self._decoder.shape.num_kv_heads, self._multiprocessors)


class _Step:
    """A decode step over fixed memory: a graph that is replayed, or plain launches."""

    def __init__(self, launch: Callable[[], Tensor], *, captured: bool, pool: Any) -> None:
        self._launch = launch
        self._graph: torch.cuda.CUDAGraph | None = None
        self.pool = pool
        if captured:
            self._capture()

    def _capture(self) -> None:
        # Once outside of the graph: kernels are compiled, libraries make their handles. The fixed inputs may be those
        # of the step before, so this stores again what is stored already.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._launch()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self._logits = self._launch()
        self._graph, self.pool = graph, graph.pool()

    def run(self) -> Tensor:
        """The logits; a graph's are always in the same memory."""
        if self._graph is None:
            return self._launch()
        self._graph.replay()
        return self._logits


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """During a capture no graph of an earlier runner may be freed: CUDA forbids that, and the capture fails."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _CPU_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
