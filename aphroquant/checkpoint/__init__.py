"""Checkpoints: lazy readers (safetensors directories, GGUF files, Hub ids) and an atomic sharded writer."""

from aphroquant.checkpoint.base import Checkpoint, TensorInfo
from aphroquant.checkpoint.source import open_checkpoint
from aphroquant.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "open_checkpoint"]
