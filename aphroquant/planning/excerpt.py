"""A checkpoint of the first blocks of another one: what a conversion of the whole would cost can be tried on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from aphroquant.checkpoint import Checkpoint, CheckpointWriter
from aphroquant.checkpoint.base import read_json
from aphroquant.checkpoint.carried import carried_name
from aphroquant.errors import UsageError

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_LAYERS_KEY = "num_hidden_layers"


def write_excerpt(checkpoint: Checkpoint, num_layers: int, directory: Path) -> None:
    """Its first `num_layers` blocks, and everything that is in no block, as a checkpoint of their own.

    UsageError for a GGUF file, whose tensors are not copied.
    """
    if checkpoint.path.is_file():
        raise UsageError(f"{checkpoint.path}: only directories of safetensors can be tried in parts")
    config = read_json(checkpoint.path / "config.json")
    total = config.get(_LAYERS_KEY)
    with CheckpointWriter(directory) as writer:
        for name, info in checkpoint.tensors.items():
            match = _LAYER.search(name)
            if match is None or int(match[1]) < num_layers:
                writer.add_pieces(name, info.dtype, info.shape, checkpoint.read_pieces(name))
        for path in checkpoint.carried_files():
            writer.add_file(path, carried_name(path))
        writer.finish({key: _shortened(key, value, total, num_layers) for key, value in config.items()})


def _shortened(key: str, value: Any, total: Any, num_layers: int) -> Any:
    """A setting, its entries for the layers that are left."""
    if key == _LAYERS_KEY:
        return num_layers
    if isinstance(value, list) and len(value) == total:
        return value[:num_layers]
    return json.loads(json.dumps(value))
