"""Texts and conversations to token ids and back, in a thread of its own: long prompts must not hold up streams.

Conversations are rendered only by aphroquant.engine.prompts, with the model's own template in a sandbox; requests bring
no templates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from aphroquant.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_WAITING = 256  # prompts, each of up to a whole request body

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Prompts:
    """A tokenizer behind one worker thread: fast tokenizers may not be used by two threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._num_waiting = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        self._check_len(len(text), param="prompt")
        return await self._in_thread(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> list[int]:
        """The token ids of a conversation, up to where the assistant's next turn begins."""
        self._check_len(sum(len(message["content"]) for message in messages), param="messages")
        return await self._in_thread(lambda: _encode_chat(self._tokenizer, messages, options))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return await self._in_thread(lambda: self._decode(token_ids))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        if self._num_waiting >= MAX_WAITING:
            raise RequestError("too many prompts wait for tokenization; try again later", status=503, code="queue_full")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_waiting -= 1

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        try:
            text = self._tokenizer.decode(list(token_ids))
        except (OverflowError, IndexError, TypeError, ValueError) as error:
            raise RequestError(f"tokens: not token ids of this model: {error}", param="tokens") from error
        return str(text)

    def _check_len(self, num_characters: int, *, param: str) -> None:
        """Refuse what is certainly too long before spending seconds of tokenization on it."""
        limit = self._max_model_len * self._longest_token
        if num_characters > limit:
            raise RequestError(
                f"{num_characters} characters are more than the {self._max_model_len} tokens of the model's context"
                f" can hold ({limit})",
                param=param,
                code="context_length_exceeded",
            )

    @cached_property
    def _longest_token(self) -> int:
        return max((len(token) for token in self._tokenizer.get_vocab()), default=1)


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
) -> list[int]:
    """As chat_prompt, and whatever else a template can fail with is the request's fault too."""
    from aphroquant.engine.prompts import chat_prompt  # brings transformers: only when a server really starts

    try:
        return chat_prompt(tokenizer, messages, **options)
    except RequestError:
        raise
    except Exception as error:
        # a template is a program over the client's messages, and can fail in any way on them
        logger.exception("the chat template failed")
        raise RequestError("the chat template failed on these messages", param="messages") from error
