"""The requests of the OpenAI API, as this server understands them.

Three kinds of fields:
- understood: typed, bounded, and mapped to SamplingParams;
- harmless: accepted and without effect (they concern OpenAI's own storage and billing);
- neutral: known, but only with the value that changes nothing; anything else is refused by name, because an answer that
  silently ignores what was asked is worse than none.
Every other field is refused. Types are strict: a number in quotes is not a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from aphroquant.engine.types import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS, SamplingParams
from aphroquant.errors import RequestError

MAX_MESSAGES = 4096
MAX_PROMPTS = 128
MAX_STOP_LEN = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_TOKEN_IDS = 2**22
COMPLETION_MAX_TOKENS = 16  # the API's own default for completions; chat answers are as long as the context holds

Count = Annotated[int, Field(ge=0, lt=2**31)]
Integer32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Integer64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
ShortText = Annotated[str, Field(max_length=256)]
TokenIds = Annotated[list[Count], Field(max_length=MAX_TOKEN_IDS)]
Harmless = Any


class Neutral:
    """A validator that lets null and the given values pass, and refuses any other by the field's name."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def __call__(self, value: Any, info: ValidationInfo) -> None:
        if not any(value == neutral and type(value) is type(neutral) for neutral in self._values):
            raise PydanticCustomError("unsupported", "{field} is not supported", {"field": info.field_name})


Unsupported = Annotated[Any, AfterValidator(Neutral())]
NoTools = Annotated[Any, AfterValidator(Neutral([]))]
NoToolChoice = Annotated[Any, AfterValidator(Neutral("none", "auto"))]


def _as_list(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("stop", "must be a text or a list of texts")
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise PydanticCustomError("content", "must be a text or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


StopStrings = Annotated[
    list[Annotated[str, Field(max_length=MAX_STOP_LEN)]],
    BeforeValidator(_as_list),
    Field(max_length=MAX_STOP_STRINGS),
]


class Strict(BaseModel):
    """Base of all requests: no unknown fields, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """`include_usage` asks for a last chunk that counts the tokens."""

    include_usage: bool = False
    include_obfuscation: Harmless = None


class ResponseFormat(Strict):
    """Plain text is the only format."""

    type: Literal["text"]


class SamplingFields(Strict):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Integer64 | None = None
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # extensions that other open servers have too
    top_k: Integer32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: ShortText | None = None

    user: Harmless = None
    store: Harmless = None
    metadata: Harmless = None
    service_tier: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    logit_bias: Annotated[Any, AfterValidator(Neutral({}))] = None

    def _sampling(self, **fields: Any) -> SamplingParams:
        """Sampling parameters from the shared fields and the given ones; an absent field keeps its default."""
        names = ("n", "max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "top_k",
                 "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output")  # fmt: skip
        asked = {name: getattr(self, name) for name in names} | fields
        asked |= {"stop": _tuple(self.stop), "stop_token_ids": _tuple(self.stop_token_ids)}
        sampling = SamplingParams(**{name: value for name, value in asked.items() if value is not None})
        sampling.validate()
        return sampling

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


class TextPart(Strict):
    """A piece of a message. Text is the only kind."""

    type: Literal["text"]
    text: str


Content = Annotated[list[TextPart], BeforeValidator(_as_parts), Field(max_length=MAX_MESSAGES)]


class Message(Strict):
    """One turn of a conversation. An assistant's turn may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: ShortText | None = None
    refusal: Unsupported = None
    annotations: NoTools = None
    audio: Unsupported = None
    tool_calls: NoTools = None
    function_call: Unsupported = None

    def for_template(self) -> dict[str, str]:
        """The turn as chat templates know it: developer is OpenAI's later name of system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ChatTemplateOptions(Strict):
    """The switches of chat templates that a request may set; no request brings a template of its own."""

    enable_thinking: bool | None = None


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None

    parallel_tool_calls: Harmless = None
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    functions: NoTools = None
    function_call: NoToolChoice = None
    modalities: Annotated[Any, AfterValidator(Neutral(["text"]))] = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Annotated[Any, AfterValidator(Neutral("none"))] = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def sampling(self) -> SamplingParams:
        """The sampling parameters, or RequestError naming the field that is out of range."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs = true", param="top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                "max_completion_tokens and max_tokens are two names of one limit and must not differ",
                param="max_completion_tokens",
            )
        return self._sampling(
            max_tokens=next(iter(both), None),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments for the chat template."""
        return {} if self.chat_template_kwargs is None else self.chat_template_kwargs.model_dump(exclude_none=True)


Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """The four spellings of `prompt` (text, texts, token ids, lists of token ids) as one list of prompts."""
    if isinstance(value, str) or _are_token_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(p, str) or _are_token_ids(p) for p in value):
        raise PydanticCustomError("prompt", "must be a text, a list of texts, token ids, or a list of token ids")
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", "must be at most {limit} prompts", {"limit": MAX_PROMPTS})
    return value


def _are_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_TOKEN_IDS
        and all(type(token_id) is int and 0 <= token_id < 2**31 for token_id in value)
    )


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_prompts)]  # list[Prompt] once validated
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    suffix: Annotated[Any, AfterValidator(Neutral(""))] = None

    @property
    def prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = self.prompt
        return prompts

    def sampling(self) -> SamplingParams:
        """The sampling parameters, or RequestError naming the field that is out of range."""
        num_choices = len(self.prompts) * (self.n or 1)
        if num_choices > MAX_N:
            raise RequestError(f"{num_choices} choices (prompts x n) must be at most {MAX_N}", param="n")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of is not supported unless it equals n", param="best_of")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs is not supported: prompts have no logprobs here", param="echo")
        return self._sampling(
            max_tokens=COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
        )


class TokenizeRequest(Strict):
    """Body of POST /tokenize: the tokens of a text, or of a conversation after the chat template."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: TokenIds
