"""An amount of bytes on the command line."""

from __future__ import annotations

import re

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class ByteAmount(click.ParamType[int]):
    """An amount of bytes: bytes, or with a unit such as 512MiB or 4GB."""

    name = "bytes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", value.strip().lower())
        if match is None:
            self.fail(f"{value!r} is not an amount of bytes; write bytes, 512MiB or 4GB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or ""])
