"""Which kernel takes how many tokens: the one that was measured to be faster, on the nearest product of both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aphroquant.kernels.cuda.device import Gpu
from aphroquant.kernels.cuda.integer import crossover
from aphroquant.kernels.cuda.integer.crossover import batch_is_faster
from aphroquant.kernels.cuda.tuning import Entry, Problem

TIMES = {  # by kernel, outputs, tokens
    "integer_decode": {(4096, 1): 5.0, (4096, 16): 7.0, (28672, 16): 20.0, (57344, 16): 50.0},
    "integer_wgmma": {(4096, 16): 6.0, (28672, 16): 25.0},
    "lookup_decode": {(4096, 16): 7.0},
    "lookup_wgmma": {(4096, 16): 8.0},
}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def table(name: str, gpu_name: str, architecture: str) -> tuple[Entry, ...]:
        times = TIMES[name].items()
        kind = "table group=64" if name.startswith("lookup") else "bits=4"
        return tuple(Entry(Problem(kind, rows, 4096, tokens), {}, us) for (rows, tokens), us in times)

    monkeypatch.setattr(crossover, "gpu", lambda device: Gpu(0, "Test GPU", (9, 0), 1, 1, 1))
    monkeypatch.setattr(crossover, "load_table", table)
    batch_is_faster.cache_clear()
    yield
    batch_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("out_features", "tokens", "expected"),
    [
        (4096, 1, False),
        (4096, 8, False),
        (4096, 9, True),
        (4096, 16, True),
        (5120, 12, True),
        (28672, 16, False),
        (57344, 16, False),  # measured with one kernel only: the nearest that both ran decides
        (28672, 17, True),
    ],
)
def test_the_faster_kernel_is_taken(out_features: int, tokens: int, expected: bool) -> None:
    assert batch_is_faster(4, out_features, 4096, tokens, 0) is expected


def test_lookup_weights_have_times_of_their_own() -> None:
    assert not batch_is_faster(4, 4096, 4096, 16, 0, "table group=64")


def test_without_measurements_the_number_of_tokens_decides() -> None:
    assert not batch_is_faster(8, 4096, 4096, 16, 0)
    assert batch_is_faster(8, 4096, 4096, 17, 0)
