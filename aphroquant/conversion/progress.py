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

    def of(self, name: str) -> Progress:
        """The same for one of several outputs, whose notes and warnings say which it is."""
        return _OfOutput(self, name)


class _OfOutput(Progress):
    """Tells another what it is told, with a name before it."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def stage(self, text: str) -> None:
        self._progress.stage(f"{self._name}: {text}")

    def block(self, done: int, total: int) -> None:
        self._progress.block(done, total)

    def note(self, text: str) -> None:
        self._progress.note(f"{self._name}: {text}")

    def warn(self, text: str) -> None:
        self._progress.warn(f"{self._name}: {text}")
