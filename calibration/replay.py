"""Work that is repeated on the same tensors: on a GPU recorded once and replayed, which costs no launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

_CALLS_BEFORE_RECORDING = 2  # libraries prepare themselves in the first calls, which cannot be recorded


class Replayed:
    """Calls `work`, which reads and writes tensors that stay where they are and decides nothing by their values."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._on_gpu = device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        if self._stream is None:
            self._work()
        elif self._graph is not None:
            self._graph.replay()
        elif self._calls < _CALLS_BEFORE_RECORDING:
            self._calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._work()
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            self._graph = self._recorded(self._stream)
            self._graph.replay()

    def release(self) -> None:
        """Give the recording's memory back now: whoever is called usually holds this object, so that only a collection
        of garbage would find the two."""
        self._graph = None
        self._work = _nothing

    def _recorded(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """What torch.cuda.graph does, without its collection of garbage, which takes longer than most graphs."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                self._work()
            finally:
                graph.capture_end()
        return graph


def _nothing() -> None:
    """What is left of released work."""
