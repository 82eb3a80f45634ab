"""An amount of bytes on the command line."""

from __future__ import annotations

import click

from aphroquant.amounts import bytes_in


class ByteAmount(click.ParamType[int]):
    """An amount of bytes: bytes, or with a unit such as 512MiB or 4GB."""

    name = "bytes"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        amount = bytes_in(value)
        if amount is None:
            self.fail(f"{value!r} is not an amount of bytes; write bytes, 512MiB or 4GB", param, ctx)
        return amount
