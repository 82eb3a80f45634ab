"""From options as the command line gives them to the request that convert() makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aphroquant.calibration.effort import DEFAULT_EFFORT, find_effort
from aphroquant.conversion.request import ConversionRequest
from aphroquant.conversion.rules import parse_rule
from aphroquant.conversion.targets import check_known


def make_request(source: str | Path, *, to: str, out: str | Path, **options: Any) -> ConversionRequest:
    """The request. UsageError for what cannot be meant."""
    check_known(to)
    rules, calibration = options.pop("rules", ()), options.pop("calibration", ())
    samples, effort = options.pop("samples", None), options.pop("effort", DEFAULT_EFFORT)
    return ConversionRequest(
        source=str(source),
        to=to,
        out=Path(out),
        samples=find_effort(effort).samples if samples is None else samples,
        effort=effort,
        calibration=tuple(map(Path, calibration)),
        ignore=tuple(options.pop("ignore", ())),
        rules=tuple(map(parse_rule, rules)),
        **options,
    )
