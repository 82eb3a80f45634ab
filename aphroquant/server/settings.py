"""How the server is set up, beside its engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aphroquant.errors import UsageError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, who may enter, and how much it takes on."""

    host: str = "127.0.0.1"
    port: int = 2242
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None  # None: the model's directory or Hub name
    max_open: int = 1024  # choices that run or wait at a time
    log_level: str = "warning"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"port = {self.port} must be between 0 (any free port) and 65535")
        if self.max_open < 1:
            raise UsageError(f"max_open = {self.max_open} must be at least 1")
        if self.log_level not in LOG_LEVELS:
            raise UsageError(f"log_level = {self.log_level!r} must be one of {', '.join(LOG_LEVELS)}")
        if not all(key and key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise UsageError("an API key must be non-empty printable ASCII without spaces")

    def model_name(self, model: str) -> str:
        """The name that requests use for a model."""
        return self.served_model_name or (Path(model).resolve().name if Path(model).exists() else model)
