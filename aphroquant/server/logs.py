"""Logging of the server's two processes."""

from __future__ import annotations

import logging


def set_up_logging(level: str) -> None:
    """The project's own words at `level`, everyone else's from warnings on, all on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("aphroquant").setLevel(level.upper())
