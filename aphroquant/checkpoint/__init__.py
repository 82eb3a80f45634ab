"""Checkpoints: lazy readers (safetensors directories, GGUF files, Hub ids) and an atomic sharded writer."""
