"""Text from tokens as they come. What is given out never changes: together it is the decode of the whole output.

Two worlds of tokenizers: byte-level BPE, where every token is a fixed run of bytes, so an incremental UTF-8 decoder
is exact and costs one look-up; and everything else (SentencePiece style: spaces as U+2581, `<0xE2>` byte tokens), where
the last tokens are decoded again in a short window. Special tokens have no text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes, a token at least one


class Detokenizer(Protocol):
    """The text of one output. `add` gives what a token settles, `finish` the rest."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class DetokenizerFactory:
    """Makes detokenizers, and knows the text of single tokens. What it looks up in the tokenizer is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._is_byte_level = _is_byte_level(tokenizer)
        self._num_tokens = len(tokenizer)
        self._pieces: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def make(self, prompt: Sequence[int]) -> Detokenizer:
        """A detokenizer for an output that follows `prompt`."""
        return ByteLevelDetokenizer(self) if self._is_byte_level else WindowDetokenizer(self, prompt)

    def special_tokens(self, texts: Collection[str]) -> frozenset[int]:
        """The special tokens that are written like one of `texts`."""
        return frozenset(token for token, text in self._special.items() if text in texts)

    def has_text(self, token: int) -> bool:
        """False for special tokens and for ids that the tokenizer does not know (padding of the vocabulary)."""
        return token < self._num_tokens and token not in self._special

    def piece(self, token: int) -> str:
        """The token as it stands in the vocabulary; nothing for an unknown one."""
        known = self._pieces.get(token)
        if known is None:
            piece = self._tokenizer.convert_ids_to_tokens(token) if token < self._num_tokens else None
            known = self._pieces[token] = piece if isinstance(piece, str) else ""
        return known

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token of a byte-level vocabulary."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = _piece_bytes(self.piece(token)) if self.has_text(token) else b""
        return known

    def token_text(self, token: int) -> str:
        """The text of a token on its own, special ones too; U+FFFD stands for parts of characters."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = str(self._tokenizer.decode([token])) if self.piece(token) else ""
        return known

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of whole outputs."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class ByteLevelDetokenizer:
    """For vocabularies whose tokens are runs of bytes."""

    def __init__(self, factory: DetokenizerFactory) -> None:
        self._factory = factory
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._factory.token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For all other vocabularies: decodes the tokens since the last settled text, after a few that came before.

    A run of byte tokens is held until it ends, because one bad byte changes how all of it is decoded.
    """

    def __init__(self, factory: DetokenizerFactory, prompt: Sequence[int]) -> None:
        self._factory = factory
        self._context: list[int] = []  # settled tokens with some text, so that decoders do not see a beginning
        self._pending: list[int] = []
        length = 4
        while not self._context and length < 2 * len(prompt) + 4:
            if factory.decode(prompt[-length:]):
                self._context = list(prompt[-length:])
            length *= 2
        self._context_text = factory.decode(self._context)

    def add(self, token: int) -> str:
        if not self._factory.has_text(token):
            return ""
        self._pending.append(token)
        if _BYTE_TOKEN.fullmatch(self._factory.piece(token)):
            return ""
        text = self._factory.decode(self._context + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _MAX_HELD_TOKENS:
            return ""
        return self._settle(text)

    def finish(self) -> str:
        return self._settle(self._factory.decode(self._context + self._pending)) if self._pending else ""

    def _settle(self, text: str) -> str:
        fresh = text[len(self._context_text) :]
        alone = self._factory.decode(self._pending)
        self._context = self._pending if alone else self._context + self._pending
        self._context_text = alone or text
        self._pending = []
        return fresh


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return False
    decoder = json.loads(backend.to_str())["decoder"]
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself if it prints, else one above 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    """Added tokens may hold characters outside of the alphabet; they stand for themselves."""
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return piece.encode()
