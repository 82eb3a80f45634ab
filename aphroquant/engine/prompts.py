"""Prompts as tokens: plain text, and chat messages through the model's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aphroquant.checkpoint.template_limits import limited_rendering
from aphroquant.errors import RequestError

Messages = Sequence[Mapping[str, Any]]


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a plain prompt, with whatever the tokenizer puts around a text."""
    _check_unicode(text, "prompt")
    return list(tokenizer(text)["input_ids"])


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: Any) -> list[int]:
    """The tokens of a conversation up to where the assistant's next words begin.

    The template is the model's own and runs in transformers' sandbox, within limits of time and size. Control tokens
    written out in a message are ordinary text: who writes a message cannot end it and begin another. `options` are
    variables of the template.
    """
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template: send a plain prompt instead", param="messages")
    for message in messages:
        for value in dict(message).values():
            _check_unicode(str(value), "messages")
    try:
        with limited_rendering(tokenizer.chat_template):
            tokens: Any = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,
                **options,
            )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(f"messages do not fit the model's chat template: {error}", param="messages") from error
    return [int(token) for token in tokens]


def _check_unicode(text: str, param: str) -> None:
    """Half a character (what is left of bytes that are not UTF-8, say) has no tokens."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{param}: the text is not valid Unicode", param=param)
