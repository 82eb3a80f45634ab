"""Every error that a user can cause, as one tree; each carries the exit code that the command line ends with.

    AphroquantError            1  internal error (also any other exception)
    ├── UsageError             2  a parameter is wrong, or does not fit the model
    ├── InputError             3  a file, checkpoint or text cannot be read, or holds something unsupported
    ├── GateError              4  the result was written and measured, and missed a quality gate; inspect --verify
    │                             found errors, or the two checkpoints of inspect A B differ
    ├── ResourceError          5  out of disk or memory
    └── RequestError           -  one request to the engine or server is wrong (HTTP 4xx); the engine goes on

A message is one sentence that names the file, tensor or parameter, the value and the rule; `hint` says what to do.
An interrupted command ends with 130, and a terminated convert with 143; both remove what is half written.
"""

from __future__ import annotations

import errno

EXIT_OK = 0
EXIT_INTERRUPTED = 130
MAX_MESSAGE = 1000  # characters: messages quote files, which may hold anything


class AphroquantError(Exception):
    """Base of all errors raised on purpose. `hint` is shown on its own line after the message."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.message)


class UsageError(AphroquantError):
    """A parameter is wrong, or does not fit the model."""

    exit_code = 2


class InputError(AphroquantError):
    """A file, checkpoint or text cannot be read, or holds something unsupported."""

    exit_code = 3


class GateError(AphroquantError):
    """The result missed a quality gate, or a checkpoint is not what it was checked to be."""

    exit_code = 4


class ResourceError(AphroquantError):
    """The disk or the memory is too small."""

    exit_code = 5


class RequestError(AphroquantError):
    """One request is wrong. `param` names the field, `status` is the HTTP status, `code` OpenAI's error code."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


def one_line(text: str) -> str:
    """The text as one line that a terminal shows as it stands, its middle left out if it is long."""
    words = " ".join(text.split())
    plain = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in words)
    return plain if len(plain) <= MAX_MESSAGE else f"{plain[: MAX_MESSAGE - 300]} ... {plain[-290:]}"


# torch, its libraries and the system have no common error for it. In lower case.
_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "can't start new thread")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused: by Python, by torch's allocators, or by the system."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_disk_full(error: BaseException) -> bool:
    """Whether the system refused to write more: a full disk, a quota or a limit on files."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def out_of_memory() -> ResourceError:
    """The error for it where nothing better is known."""
    return ResourceError(
        "out of memory", hint="free some memory, or raise the limit that was set on it (ulimit -v, a container's)"
    )
