"""Small outputs of conversions, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import aphroquant

SOURCE_CARD = """---
license: other
license_name: tiny-license
license_link: LICENSE
language: [en, no]
tags: [tiny, "4-bit"]
pipeline_tag: text-generation
library_name: transformers
datasets: [made/up]
---
# Tiny

A model with | a bar.
"""


@pytest.fixture(scope="session")
def source(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of two shards, with a card and a licence."""
    made = tiny_checkpoint("llama", torch_dtype="float16", max_shard_size="200KB")
    path = tmp_path_factory.mktemp("source") / "Tiny-Model"
    shutil.copytree(made, path)
    (path / "README.md").write_text(SOURCE_CARD)
    (path / "LICENSE").write_text("Do as you like.\n")
    return path


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPTQ checkpoint, not to be changed."""
    out = tmp_path_factory.mktemp("made") / "Tiny-GPTQ"
    aphroquant.convert(source, to="gptq", out=out, symmetric=True, solver="rtn", samples=0)
    return out


@pytest.fixture(scope="session")
def made_gguf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file in a directory of its own, not to be changed."""
    out = tmp_path_factory.mktemp("gguf")
    aphroquant.convert(source, to="gguf", scheme="q8_0", out=out / "Tiny.gguf")
    return out / "Tiny.gguf"


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A copy of the GPTQ checkpoint."""
    return Path(shutil.copytree(made, tmp_path / "Tiny-GPTQ"))


@pytest.fixture
def gguf(made_gguf: Path, tmp_path: Path) -> Path:
    """A copy of the GGUF file and of what lies beside it."""
    return Path(shutil.copytree(made_gguf.parent, tmp_path / "gguf")) / made_gguf.name
