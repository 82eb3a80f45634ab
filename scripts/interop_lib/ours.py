"""Our side of a comparison: dense sources, what `convert` makes of them, and what we compute from a checkpoint."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.cli import cli
from aphroquant.errors import AphroquantError
from aphroquant.models.streamed import StreamedModel
from aphroquant.schemes import DenseScheme

ROOT = Path(__file__).parent.parent.parent
# Every size is one that each format and kernel in question takes: super-blocks of 256, groups of 128.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


class FailedError(Exception):
    """A program did not do what it was asked. The text is the end of what it said."""


@dataclass(frozen=True)
class Computed:
    """What we make of a checkpoint: its quantized weights, on demand, and its logits."""

    checkpoint: Checkpoint
    logits: torch.Tensor | None

    def modules(self) -> list[str]:
        schemes = self.checkpoint.schemes()
        return [module for module, scheme in schemes.items() if not isinstance(scheme, DenseScheme)]

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        return self.checkpoint.weight(module).dequantize(dtype)


def compute(path: Path, token_ids: torch.Tensor) -> Computed:
    """Weights and float32 logits [B, S, V] of a checkpoint. No logits of a family that has no decoder here."""
    opened = open_checkpoint(path)
    if opened.config["model_type"] == "gpt_oss":
        return Computed(opened, None)
    model = StreamedModel(opened)
    hidden = model.hidden_states(token_ids)
    return Computed(opened, torch.stack([model.logits(row) for row in hidden]))


def dense_source(folder: Path, dtype: str) -> Path:
    """A tiny random Llama, the same each time."""
    path = folder / f"dense-{dtype}"
    if not path.exists():
        write = load_module(ROOT / "tests" / "conftest.py")._write_tiny_checkpoint
        write(path, "llama", {**SIZES, "torch_dtype": dtype})
    return path


def convert(source: Path, out: Path, options: list[str]) -> None:
    """`aphroquant convert`, as a user would run it, but for the start of another process."""
    arguments = ["convert", str(source), "--out", str(out), *options]
    try:
        with redirect_stdout(sys.stderr):
            cli.main(arguments, standalone_mode=False)
    except AphroquantError as error:
        raise FailedError(f"aphroquant {' '.join(arguments)}: {error}") from error


def last_lines(text: str) -> str:
    """The end of what a failing program said, on one line."""
    return " ".join(line.strip() for line in text.strip().splitlines()[-3:])


def sample_tokens(vocab_size: int, length: int = 24) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@cache
def load_module(path: Path) -> Any:
    """A file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(f"interop_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
