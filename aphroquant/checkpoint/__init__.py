"""Checkpoints: lazy readers (safetensors directories, GGUF files, Hub ids) and atomic writers of both."""

from aphroquant.checkpoint.base import Checkpoint, TensorInfo
from aphroquant.checkpoint.gguf_writer import EncodedRows, GgufTensorPlan, GgufWriter
from aphroquant.checkpoint.source import open_checkpoint
from aphroquant.checkpoint.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "EncodedRows",
    "GgufTensorPlan",
    "GgufWriter",
    "TensorInfo",
    "open_checkpoint",
]
