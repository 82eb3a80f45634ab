"""How a conversion tells what it is doing; the command line draws it, the Python API is silent."""

from __future__ import annotations


class Progress:
    """Called as the work goes on. This one says nothing."""

    def stage(self, text: str) -> None:
        """A step that takes a while begins."""

    def block(self, done: int, total: int) -> None:
        """So many blocks of the model are done."""

    def note(self, text: str) -> None:
        """Something the user should know, that is no fault."""

    def warn(self, text: str) -> None:
        """Something that makes the result worse than it should be."""
