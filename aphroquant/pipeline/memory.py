"""The most memory that this process has had since a moment."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


def forget_peak() -> bool:
    """Begin anew. False where the system has no such thing (it is not Linux, or forbids it)."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def peak_since() -> int | None:
    """Bytes, since `forget_peak`."""
    try:
        found = _PEAK.search(_STATUS.read_text(encoding="utf-8"))
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
