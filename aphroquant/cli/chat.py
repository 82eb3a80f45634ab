"""aphroquant chat: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import click

from aphroquant.engine.types import (
    NOT_NUMBERS,
    NOT_NUMBERS_HINT,
    EngineConfig,
    GenerationRequest,
    SamplingParams,
)
from aphroquant.errors import AphroquantError, InputError, RequestError, UsageError

if TYPE_CHECKING:
    from aphroquant.engine.engine import Engine

HELP = """\
/reset  forget the conversation
/help   show this
Ctrl-C  stop the answer
Ctrl-D  leave"""


@click.command()
@click.argument("model", metavar="DIR")
@click.option("--system", metavar="TEXT", help="Instructions for the model.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0), help="0 is greedy.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.  [default: what the context holds]")
@click.option("--prompt", metavar="TEXT", help="Answer this on stdout, and leave.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where the model runs; auto is a GPU if one can be used.",
)
def command(
    model: str, system: str | None, temperature: float, max_tokens: int | None, prompt: str | None, device: str
) -> None:
    """Talk to the model in DIR (a checkpoint directory, GGUF file or Hub id).

    With --prompt, or with the prompt on standard input, the answer is written plainly to standard output.
    """
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    with _bad_request_is_bad_usage():
        sampling.validate()
    interactive = prompt is None and sys.stdin.isatty()
    if not interactive:
        prompt = _one_prompt(prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an emoji must not end the answer where the encoding is Latin-1
    from aphroquant.engine.engine import Engine

    engine = Engine(EngineConfig(model=model, max_num_seqs=1, device=device))
    conversation = Conversation(engine, system, sampling)
    if prompt is None:
        _converse(conversation)
        return
    with _bad_request_is_bad_usage():
        _write(conversation.answer(prompt))


@contextlib.contextmanager
def _bad_request_is_bad_usage() -> Iterator[None]:
    """What a server would answer with a 400 is here the fault of the command line."""
    try:
        yield
    except RequestError as error:
        if error.status >= 500:
            raise
        raise UsageError(error.message) from error


def _one_prompt(prompt: str | None) -> str:
    """The prompt of a single answer: the option, else all of standard input."""
    text = sys.stdin.read() if prompt is None else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint="pass --prompt TEXT, or write the prompt to standard input")
    return text.removesuffix("\n")


class Conversation:
    """The turns so far, and the engine that continues them."""

    def __init__(self, engine: Engine, system: str | None, sampling: SamplingParams) -> None:
        self._engine = engine
        self._sampling = sampling
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self._turns = []

    def answer(self, text: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The pieces of the answer to `text` as they come, until it is complete or `is_stopped`.

        The turn is remembered with as much of its answer as was made; one that fails is not.
        """
        from aphroquant.engine.prompts import chat_prompt

        question = {"role": "user", "content": text}
        token_ids = chat_prompt(self._engine.tokenizer, [*self._first, *self._turns, question])
        request = GenerationRequest(request_id="answer", prompt_token_ids=token_ids, sampling=self._sampling)
        self._engine.add_request(request)
        pieces: list[str] = []
        while self._engine.has_unfinished():
            if is_stopped():
                self._engine.abort(request.request_id)
            for delta in self._engine.step():
                if delta.error is not None:
                    raise self._failure(delta.error)
                pieces.append(delta.text)
                yield delta.text
        self._turns += [question, {"role": "assistant", "content": "".join(pieces)}]

    def _failure(self, error: str) -> AphroquantError:
        """What ended an answer: a model that computes no numbers is a file that cannot be used."""
        if error == NOT_NUMBERS:
            return InputError(f"{self._engine.config.model}: {error}", hint=NOT_NUMBERS_HINT)
        return RequestError(error, status=500)


def _converse(conversation: Conversation) -> None:
    """Read turns and write answers until the end of the input."""
    with contextlib.suppress(ImportError):  # arrow keys, where the platform has them
        importlib.import_module("readline")
    click.echo("Ctrl-D leaves, /help shows more", err=True)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D leaves", err=True)
            continue
        match text:
            case "":
                pass
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                conversation.reset()
            case _ if text.startswith("/"):
                click.echo(f"unknown command {text.split()[0]}; /help shows those there are", err=True)
            case _:
                _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    """Write one answer; Ctrl-C stops it between two steps of the engine, never inside one."""
    with _interrupts() as pressed:
        try:
            _write(conversation.answer(text, pressed.is_set))
        except AphroquantError as error:
            click.echo(f"error: {error.message}", err=True)
            if error.hint is not None:
                click.echo(f"hint: {error.hint}", err=True)


def _write(pieces: Iterator[str]) -> None:
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, instead of raising KeyboardInterrupt."""
    pressed = threading.Event()

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()

    previous = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
