"""Request bodies to request models: every fault is one RequestError that names the field and the rule."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from aphroquant.errors import RequestError

MAX_ECHO_LEN = 128  # of what a client sent, in an answer to it

Model = TypeVar("Model", bound=BaseModel)


def parse(body: bytes, model: type[Model]) -> Model:
    """The request in a JSON body, or RequestError for its first fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False, include_input=False), model) from None


def _request_error(faults: Sequence[ErrorDetails], model: type[BaseModel]) -> RequestError:
    fault = faults[0]
    param = ".".join(str(part) for part in fault["loc"])[:MAX_ECHO_LEN]
    message = fault["msg"]
    match fault["type"]:
        case "json_invalid":
            return RequestError(f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}")
        case "extra_forbidden":
            suggestion = _suggestion(param, model) if len(fault["loc"]) == 1 else ""
            return RequestError(f"unknown field {param!r}.{suggestion}", param=param)
        case "missing":
            return RequestError(f"{param} is required", param=param)
        case "unsupported":
            return RequestError(message, param=param, code="unsupported_parameter")
        case "too_long":
            return RequestError(f"{param} must have at most {fault['ctx']['max_length']} items", param=param)
        case "too_short":
            return RequestError(f"{param} must have at least {fault['ctx']['min_length']} items", param=param)
        case "model_type" if not param:
            return RequestError("the body must be a JSON object")
    return RequestError(f"{param}: {message[:1].lower()}{message[1:]}", param=param)


def _suggestion(name: str, model: type[BaseModel]) -> str:
    close = difflib.get_close_matches(name, model.model_fields, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
