"""Reads one damaged checkpoint in every way that the product does, and says how that ended."""

from __future__ import annotations

import contextlib
import hashlib
import io
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.inspection import inspect_checkpoint
from aphroquant.cli import run
from aphroquant.errors import AphroquantError, InputError

MAX_SECONDS = 5.0  # of processor time
MAX_GROWTH = 2**29  # bytes of resident memory
MAX_MESSAGE = 1000
COMMAND_SHARE = 0.4  # of the cases, that are put to the command line too
EXIT_ERRORS_FOUND = 4  # by inspect --verify, or differences
_REFUSED = (2, 3)
_TARGETS = (
    ("gptq", "--solver", "rtn", "--samples", "0", "--group-size", "32"),
    ("awq", "--solver", "rtn", "--samples", "0", "--group-size", "32"),
    ("compressed-tensors", "--solver", "gptq", "--samples", "2", "--seq-len", "16", "--group-size", "32"),
    ("fp8", "--samples", "0"),
    ("gptq",),
    ("compressed-tensors",),
    ("gguf",),
    ("gptq", "--requantize", "--solver", "rtn", "--samples", "0", "--group-size", "32"),
)


@dataclass
class Outcome:
    """`ended`: loaded, refused, or what went wrong; `codes`: exit codes of the commands; `digest` of all numbers."""

    ended: str = "loaded"
    message: str = ""
    digest: str = ""
    codes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(source: Path, output: Path, random: Random, sound: Path | None = None) -> Outcome:
    """`sound` is the undamaged checkpoint, to compare with; without it no commands are run."""
    outcome = Outcome()
    before, began = _resident(), time.process_time()
    _guarded(outcome, lambda: _read_everything(outcome, source))
    if sound is not None and random.random() < COMMAND_SHARE:
        more = random.choice([["--tensors"], ["--verify"], ["--json", "-"], [str(sound)]])
        _command(outcome, "inspect", ["inspect", str(source), *more], source)
        to, *options = random.choice(_TARGETS)
        arguments = ["convert", str(source), "--to", to, *options, "--out", str(output), "--threads", "1"]
        _command(outcome, "convert --dry-run", [*arguments, "--dry-run"], source)
        if outcome.codes.get("convert --dry-run") == 0 and random.random() < 0.5:
            _command(outcome, "convert", arguments, source)
        whole = outcome.codes.get("convert") == 0  # gguf: a file of that name
        left = sorted(path.name for path in output.parent.iterdir())
        if left != ([output.name] if whole else []):
            outcome.faults.append(f"left behind: {left}")
    seconds, grown = time.process_time() - began, _resident() - before
    if seconds > MAX_SECONDS:
        outcome.faults.append(f"took {seconds:.1f} s")
    if grown > MAX_GROWTH:
        outcome.faults.append(f"took {grown / 2**20:.0f} MiB")
    if list(Path.cwd().glob("*-was-run")):
        outcome.faults.append("code of the checkpoint was run")
    return outcome


def _read_everything(outcome: Outcome, source: Path) -> None:
    """Every weight, tensor and setting; what one of them refuses does not hide the others."""
    checkpoint = open_checkpoint(source)
    digest = hashlib.sha256()
    refused = []

    def attempt(read: Callable[[], Any]) -> None:
        try:
            digest.update(repr(read()).encode("utf-8", "surrogatepass"))
        except InputError as error:
            refused.append(error)

    modules: dict[str, Any] = {}
    attempt(lambda: modules.update(checkpoint.schemes()))
    for module in sorted(modules):
        attempt(lambda module=module: _weight_digest(checkpoint.weight(module)))
    for name in sorted(checkpoint.tensors):
        if name.rpartition(".")[0] not in modules or not name.endswith(".weight"):
            attempt(lambda name=name: _tensor_digest(checkpoint.read(name)))
    attempt(lambda: checkpoint.spec)
    attempt(lambda: checkpoint.dense_names())
    attempt(lambda: len(checkpoint.tokenizer()))
    attempt(lambda: inspect_checkpoint(checkpoint).problems != [])
    outcome.digest = digest.hexdigest()
    if refused:
        raise refused[0]


def _weight_digest(weight: Any) -> str:
    return f"{weight.scheme} {weight.shape} {_tensor_digest(weight.dequantize())}"


def _tensor_digest(tensor: Any) -> str:
    import torch

    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _guarded(outcome: Outcome, work: Callable[[], None]) -> None:
    try:
        work()
    except AphroquantError as error:
        outcome.ended, outcome.message = "refused", error.message
        outcome.faults += _faults_of(error.message)
    except MemoryError:
        outcome.ended = "out of memory"
        outcome.faults.append("out of memory")
    except BaseException:  # noqa: BLE001  Rust panics are no Exceptions
        outcome.ended = "crashed"
        outcome.faults.append("traceback: " + traceback.format_exc(limit=-6))


def _command(outcome: Outcome, name: str, arguments: list[str], source: Path) -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = run(arguments)
        except BaseException:  # noqa: BLE001
            outcome.codes[name] = 1
            outcome.faults.append(f"{name}: traceback: " + traceback.format_exc(limit=-6))
            return
    outcome.codes[name] = code
    text = stderr.getvalue()
    if code == EXIT_ERRORS_FOUND and name == "inspect":
        pass
    elif code not in (0, *_REFUSED):
        outcome.faults.append(f"{name}: exit code {code}: {text[-300:]}")
    elif code:  # named is the checkpoint, or the text that a template was to render
        lines = text.splitlines()
        if lines and lines[-1].startswith("hint: "):
            lines.pop()
        if not lines or not lines[-1].startswith("error: "):
            outcome.faults.append(f"{name}: no sentence at the end of {text[-300:]!r}")
        elif code == 3 and not any(name in lines[-1] for name in (str(source), ".jsonl")):
            outcome.faults.append(f"{name}: does not name the file: {lines[-1][:300]}")
    odd = [line for line in (text + stdout.getvalue()).split("\n") if not _plain(line)]
    if odd:
        outcome.faults.append(f"{name}: control characters: {odd[0][:200]!r}")


def _faults_of(message: str) -> list[str]:
    faults = []
    if len(message) > MAX_MESSAGE:
        faults.append(f"a message of {len(message)} characters: {message[:200]}")
    if not _plain(message):
        faults.append(f"control characters in the message: {message[:200]!r}")
    return faults


def _plain(line: str) -> bool:
    return all(character.isprintable() or character in "\t\r" for character in line)


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
