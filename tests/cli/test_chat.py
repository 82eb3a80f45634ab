"""aphroquant chat: one answer on stdout, and conversations in a terminal."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aphroquant.cli import run
from aphroquant.cli.chat import Conversation
from aphroquant.engine.types import NOT_NUMBERS, Delta, GenerationRequest, SamplingParams
from aphroquant.errors import RequestError


class Terminal:
    """`aphroquant chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._main, self._terminal = pty.openpty()
        command = [sys.executable, "-c", FAKE_CHAT, *arguments]
        self.process = subprocess.Popen(
            command, stdin=self._terminal, stdout=self._terminal, stderr=self._terminal, start_new_session=True
        )
        os.close(self._terminal)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What was shown since the last call, up to `text`."""
        deadline = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            self.shown += os.read(self._main, 4096).decode()
        before, _, self.shown = self.shown.partition(text)
        return before.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._main)


# The command with an engine that echoes the prompt it was given, one word a step; "forever" goes on until stopped.
FAKE_CHAT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fakes", {str(Path(__file__))!r})
fakes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fakes)
import aphroquant.engine.engine as engine
engine.Engine = fakes.EchoEngine
from aphroquant.cli import main
main(["chat", "model", *sys.argv[1:]])
"""
TEMPLATE = "{% for m in messages %}[{{ m.role }} {{ m.content }}]{% endfor %}"


class EchoTokenizer:
    """Renders conversations as in TEMPLATE; its token ids are characters."""

    chat_template = TEMPLATE

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [ord(letter) for message in messages for letter in f"[{message['role']} {message['content']}]"]


class EchoEngine:
    """Answers with its prompt."""

    def __init__(self, config: Any = None) -> None:
        self.config, self.tokenizer = config, EchoTokenizer()
        self.words: list[str] = []
        self.added: list[GenerationRequest] = []
        self.aborted = False

    def add_request(self, request: GenerationRequest) -> None:
        prompt = "".join(map(chr, request.prompt_token_ids))
        if "too long" in prompt:
            raise RequestError("the prompt is too long")
        self.added.append(request)
        self.words = prompt.split(" ")

    def has_unfinished(self) -> bool:
        return bool(self.words) or self.aborted

    def abort(self, request_id: str) -> None:
        self.words, self.aborted = [], True

    def step(self) -> list[Delta]:
        if self.aborted:
            self.aborted = False
            return [Delta(request_id="answer", finish_reason="abort")]
        if "forever" in self.words[0]:
            time.sleep(0.01)
            return [Delta(request_id="answer", text="more ")]
        faults = {"broken": "the forward failed", "NaN": NOT_NUMBERS}
        error = next((told for sign, told in faults.items() if sign in self.words[0]), None)
        return [Delta(request_id="answer", text=self.words.pop(0) + " ", error=error)]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aphroquant.engine.engine.Engine", EchoEngine)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("--system", "Be kind")
    yield terminal
    terminal.close()


def test_one_prompt_is_answered_on_stdout(echo: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "model", "--prompt", "Hi", "--system", "Be kind"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "[system Be kind][user Hi] \n"
    assert captured.err == ""


def test_the_prompt_may_come_from_standard_input(
    echo: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nthere\n"))
    assert run(["chat", "model"]) == 0
    assert capsys.readouterr().out == "[user Hi\nthere] \n"


def test_an_empty_prompt_is_a_usage_error(echo: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "model", "--prompt", " "]) == 2
    assert "error: the prompt is empty\nhint: pass --prompt TEXT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("too long", 2, "the prompt is too long"),
        ("be broken", 1, "the forward failed"),
        ("be NaN", 3, "model: the model's logits are not numbers (NaN or infinite)"),
    ],
)
def test_a_prompt_that_cannot_run_ends_with_an_error(
    echo: None, capsys: pytest.CaptureFixture[str], prompt: str, code: int, message: str
) -> None:
    assert run(["chat", "model", "--prompt", prompt]) == code
    assert f"error: {message}\n" in capsys.readouterr().err


def test_what_the_encoding_of_the_output_lacks_is_replaced() -> None:
    command = [sys.executable, "-c", FAKE_CHAT, "--prompt", "caf\u00e9 \U0001f389 end"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    chat = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert chat.stdout.decode("latin-1") == "[user caf\u00e9 ? end] \n", chat.stderr


@pytest.mark.parametrize("temperature", ["nan", "200"])
def test_a_temperature_out_of_range_is_a_usage_error(temperature: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "model", "--prompt", "x", "--temperature", temperature]) == 2
    assert "must be between 0 and 100" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", str(tmp_path / "none"), "--prompt", "Hi"]) == 3
    assert "none: no such file or directory" in capsys.readouterr().err


def test_options_reach_the_sampling() -> None:
    engine: Any = EchoEngine()
    conversation = Conversation(engine, None, SamplingParams(temperature=0, max_tokens=5))
    list(conversation.answer("Hi"))
    assert engine.added[0].sampling == SamplingParams(temperature=0, max_tokens=5)


def test_a_conversation_remembers_its_turns_until_it_is_reset() -> None:
    engine: Any = EchoEngine()
    conversation = Conversation(engine, None, SamplingParams())
    assert "".join(conversation.answer("A")) == "[user A] "
    assert "".join(conversation.answer("B")) == "[user A][assistant [user A] ][user B] "
    conversation.reset()
    assert "".join(conversation.answer("C")) == "[user C] "


@pytest.mark.parametrize("text", ["too long", "it is broken"])
def test_a_turn_that_fails_is_forgotten(text: str) -> None:
    engine: Any = EchoEngine()
    conversation = Conversation(engine, None, SamplingParams())
    with pytest.raises(RequestError):
        list(conversation.answer(text))
    engine.words = []
    assert "".join(conversation.answer("B")) == "[user B] "


def test_a_stopped_answer_is_remembered_as_far_as_it_went() -> None:
    engine: Any = EchoEngine()
    conversation = Conversation(engine, None, SamplingParams())
    stops = iter([False, True])
    assert "".join(conversation.answer("A B C", lambda: next(stops))) == "[user "
    assert not engine.has_unfinished()
    assert "".join(conversation.answer("D")) == "[user A B C][assistant [user ][user D] "


def test_a_terminal_conversation(terminal: Terminal) -> None:
    terminal.wait_for("Ctrl-D leaves, /help shows more")
    terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("[system Be kind][user Hello] \r\n> ")
    terminal.type("/help\n")
    terminal.wait_for("/reset  forget the conversation")
    terminal.wait_for("> ")
    terminal.type("/what now\n")
    terminal.wait_for("unknown command /what; /help shows those there are\r\n> ")
    terminal.type("this is too long\n")
    terminal.wait_for("error: the prompt is too long\r\n> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("go on forever\n")
    terminal.wait_for("more more")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("> ")
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("Ctrl-D leaves\r\n> ")
    terminal.type("\x04")
    assert terminal.process.wait(10) == 0
