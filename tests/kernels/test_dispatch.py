"""Choosing a backend: by name, by what is there, and with one warning when it gets slow."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from aphroquant.errors import UsageError
from aphroquant.kernels import dispatch
from aphroquant.kernels.cpu import library
from aphroquant.kernels.dispatch import select_backend
from aphroquant.schemes import QuantizedWeight


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(library, "obstacle", lambda: "there is no library")
    dispatch.warn_fallback.cache_clear()
    yield
    dispatch.warn_fallback.cache_clear()


def test_auto_takes_the_compiled_kernels_and_says_why(compiled: None) -> None:
    backend = select_backend()
    assert backend.name == "cpu"
    assert library.instruction_sets()[0] in backend.reason


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_prepares_a_linear_layer(compiled: None, name: str) -> None:
    weight, bias, x = torch.randn(5, 7), torch.randn(5), torch.randn(3, 7)
    layer = select_backend(name).prepare(QuantizedWeight.dense(weight), bias)
    assert (layer.in_features, layer.out_features) == (7, 5)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)


def test_without_the_library_auto_warns_once_and_takes_the_reference(no_library: None) -> None:
    with pytest.warns(RuntimeWarning, match="there is no library"):
        assert select_backend().name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend().reason == "there is no library"


def test_without_the_library_cpu_is_refused(no_library: None) -> None:
    with pytest.raises(UsageError, match="backend cpu cannot be used: there is no library"):
        select_backend("cpu")


def test_the_reference_on_demand_warns_of_nothing(no_library: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("reference").reason == "asked for"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="must be one of auto, reference, cpu, cuda"):
        select_backend("gpu")
    with pytest.raises(UsageError, match="must be int8 or float"):
        select_backend("reference", activations="fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    with pytest.raises(UsageError, match=r"backend cuda cannot be used: torch .* (without CUDA|finds no GPU)"):
        select_backend("cuda")


def test_the_environment_chooses_the_instruction_set(compiled: None) -> None:
    program = "from aphroquant.kernels.cpu.library import library; library()"
    for name, code in (("baseline", 0), ("mmx", 1)):
        done = subprocess.run(
            [sys.executable, "-c", program], env={"APHROQUANT_CPU_ISA": name}, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
    assert "APHROQUANT_CPU_ISA = 'mmx' must be one of" in done.stderr
