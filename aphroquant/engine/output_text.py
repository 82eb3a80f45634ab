"""The text of one choice: detokenized, searched for stop strings, and given out only when it cannot change any more."""

from __future__ import annotations

from collections.abc import Sequence

from aphroquant.engine.detokenizer import Detokenizer


class _StopString:
    """Finds one string in a stream of characters (Knuth, Morris, Pratt): constant time a character, any length."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # characters at the end of the stream that begin the string
        self._fallback = [0] * len(text)  # for each number of matched characters the next shorter one that fits
        matched = 0
        for index in range(1, len(text)):
            while matched and text[index] != text[matched]:
                matched = self._fallback[matched - 1]
            matched += text[index] == text[matched]
            self._fallback[index] = matched

    def feed(self, character: str) -> bool:
        """True if the string ends with this character."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._fallback[matched - 1]
        self.num_matched = matched + (self.text[matched] == character)
        return self.num_matched == len(self.text)


class OutputText:
    """Turns tokens into text for the client. Where tokens begin and end makes no difference to where the text stops."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.is_stopped = False
        self._detokenizer = detokenizer
        self._stops = [_StopString(text) for text in stop]
        self._include_stop = include_stop
        self._held = ""  # what may be the beginning of a stop string

    def add(self, token: int, *, search: bool = True) -> str:
        """What may be shown after this token. With `search` False its text cannot stop the output."""
        text = self._detokenizer.add(token)
        if search:
            return self._search(text)
        self._restart_search()
        held, self._held = self._held, ""
        return held + text

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        if self.is_stopped:
            return ""
        text = self._search(self._detokenizer.finish())
        held, self._held = self._held, ""
        return text if self.is_stopped else text + held

    def _restart_search(self) -> None:
        for stop in self._stops:
            stop.num_matched = 0

    def _search(self, text: str) -> str:
        if not self._stops:
            return text
        text, searched = self._held + text, len(self._held)
        for index in range(searched, len(text)):
            ended = [stop.text for stop in self._stops if stop.feed(text[index])]
            if ended:
                self.is_stopped = True
                self._held = ""
                return text[: index + 1 if self._include_stop else index + 1 - max(map(len, ended))]
        num_held = max(stop.num_matched for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
