"""Logprobs in the two layouts of the API."""

from __future__ import annotations

from collections.abc import Sequence

from aphroquant.engine.types import TokenLogprobs
from aphroquant.server.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
    """The layout of chat answers: one object a token."""
    return ChatLogprobs(content=[_chat_token(token) for token in tokens])


def _chat_token(token: TokenLogprobs) -> ChatTokenLogprob:
    _, logprob, text = token.chosen
    return ChatTokenLogprob(
        token=text,
        logprob=max(logprob, LEAST),
        bytes=_bytes(text),
        top_logprobs=[
            TopLogprob(token=text, logprob=max(logprob, LEAST), bytes=_bytes(text)) for _, logprob, text in token.top
        ],
    )


def _bytes(text: str) -> list[int] | None:
    """The token's bytes, unless it holds only a part of a character and its text stands for nothing."""
    return None if "\ufffd" in text else list(text.encode())


def completion_logprobs(tokens: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
    """The layout of text completions: lists side by side; `offset` is where in the text the first token begins."""
    texts = [token.chosen[2] for token in tokens]
    offsets = [offset]
    for text in texts:
        offsets.append(offsets[-1] + len(text))
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[max(token.chosen[1], LEAST) for token in tokens],
        top_logprobs=[_top(token) for token in tokens],
        text_offset=offsets[:-1],
    )


def _top(token: TokenLogprobs) -> dict[str, float]:
    """The alternatives by text; of two tokens with one text, the better stays."""
    return {text: max(logprob, LEAST) for _, logprob, text in reversed(token.top)}
