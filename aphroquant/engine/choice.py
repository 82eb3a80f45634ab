"""One choice of a request on its way: its tokens, its sampler, its text, and when it ends."""

from __future__ import annotations

from typing import NamedTuple

from aphroquant.engine.detokenizer import DetokenizerFactory
from aphroquant.engine.output_text import OutputText
from aphroquant.engine.sampling import RequestSampler
from aphroquant.engine.sequence import Sequence
from aphroquant.engine.types import FinishReason, GenerationRequest


class Progress(NamedTuple):
    """What one token brought: text to show, and the reason if it was the last."""

    text: str
    finish_reason: FinishReason | None


class Choice(Sequence):
    """A sequence that answers a request. `max_len` is the number of tokens, prompt included, where it must end."""

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        *,
        max_len: int,
        ending_tokens: frozenset[int],
        detokenizers: DetokenizerFactory,
        leader: Sequence | None = None,
    ) -> None:
        super().__init__(request.prompt_token_ids, cache_salt=request.cache_salt, leader=leader)
        params = request.sampling
        self.request_id, self.index = request.request_id, index
        self.text = OutputText(
            detokenizers.make(request.prompt_token_ids), params.stop, include_stop=params.include_stop_str_in_output
        )
        # Special tokens have no text to search: a stop string that names one stops at the token.
        stop_tokens = detokenizers.special_tokens(params.stop) | frozenset(params.stop_token_ids)
        self._ending = stop_tokens if params.ignore_eos else stop_tokens | ending_tokens
        self._min_tokens, self._max_len = params.min_tokens, max_len
        self.sampler = RequestSampler(
            params, prompt=request.prompt_token_ids, ending=self._ending, index=index
        )  # fmt: skip

    @property
    def ends_with_next(self) -> bool:
        """Whether the next token is the last one whatever it is."""
        return len(self.token_ids) + 1 >= self._max_len

    def accept(self, token: int) -> Progress:
        """Append a sampled token. A token that ends the output has no text."""
        self.token_ids.append(token)
        if token in self._ending:
            return Progress(self.text.finish(), "stop")
        text = self.text.add(token, search=self.num_output_tokens >= self._min_tokens)
        if not self.text.is_stopped and len(self.token_ids) >= self._max_len:
            return Progress(text + self.text.finish(), "stop" if self.text.is_stopped else "length")
        return Progress(text, "stop" if self.text.is_stopped else None)
