"""From what a user gives, in Python or on the command line, to a request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aphroquant.calibration.effort import DEFAULT_EFFORT, find_effort
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import parse_rule
from aphroquant.conversion.targets import check_known
from aphroquant.errors import UsageError


def make_request(
    source: str | Path,
    *,
    to: str,
    out: str | Path,
    samples: int | None = None,
    effort: str = DEFAULT_EFFORT,
    calibration: Sequence[str | Path] | str | Path | None = None,
    chat_template: str | Path | None = None,
    ignore: Sequence[str] | str = (),
    rules: Sequence[Any] = (),
    weights: Sequence[float] = (),
    **others: Any,
) -> ConversionRequest:
    """The request. `others` are fields of `ConversionRequest` as they are. UsageError for what cannot be meant."""
    check_known(to)
    if not str(out).strip():
        raise UsageError("--out is empty", hint="give the directory (for gguf also a file) to make")
    paths = [calibration] if isinstance(calibration, str | Path) else calibration or ()
    return ConversionRequest(
        source=str(source),
        to=to,
        out=Path(out),
        calibration=tuple(Path(path) for path in paths),
        samples=find_effort(effort).samples if samples is None else samples,
        effort=effort,
        chat_template=None if chat_template is None else Path(chat_template),
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        rules=tuple(parse_rule(rule) if isinstance(rule, str) else rule for rule in rules),
        weights=tuple(weights),
        **others,
    )
