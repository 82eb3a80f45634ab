"""The convert command: exit codes, what goes to stdout and stderr, interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.cli import run
from aphroquant.errors import EXIT_INTERRUPTED

Tiny = Callable[..., Path]
CHAT = str(DEFAULT_TEXTS / "calibration_chat.jsonl")
QUICK = ("--samples", "4", "--seq-len", "32", "--calibration", CHAT)


def test_a_conversion_prints_its_result_on_stdout_and_its_progress_on_stderr(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    arguments = ["convert", str(tiny_checkpoint("llama")), "--to", "awq", "--out", str(tmp_path / "out")]
    assert run([*arguments, *QUICK, "--json", str(report)]) == 0
    printed = capsys.readouterr()
    assert "int4 asym g64" in printed.out
    assert "14 quantized, 4." in printed.out
    assert "calibrating and solving" in printed.err
    assert "2/2  " in printed.err
    assert json.loads(report.read_text())["num_modules"] == 14
    assert (tmp_path / "out" / "config.json").exists()


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["convert", str(tiny_checkpoint("llama")), "--to", "gptq", "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("would write  ")
    assert "solver       awq-gptq" in printed
    assert not out.exists()


def test_rules_averages_and_sizes_are_options(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["convert", str(tiny_checkpoint("llama")), "--to", "gptq", "--out", str(tmp_path / "out"), "--dry-run"]
    assert run([*start, "--rule", "down: bits=8", "--rule", "layers[0].down: keep"]) == 0
    assert "int4 asym g64 (12), int8 asym g64 (1)" in capsys.readouterr().out
    assert run([*start, "--bits", "4.8", "--group-size", "32"]) == 0
    assert "guessed bits: 4." in capsys.readouterr().err
    assert run([*start, "--size", "0.4MB", "--rule", "down: keep"]) == 0
    assert "guessed bits" in capsys.readouterr().err
    for value, message in (("four", "is no number of bits; write 4, or 3.5 for an average"), ("9", "between 1 and 8")):
        assert run([*start, "--bits", value]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to", "awq", "--group-size", "48"], 2, "must be divisible by group_size = 48"),
        (["--to", "awk"], 2, "Did you mean 'awq'?"),
        (["--to", "gptq", "--solver", "gptk"], 2, "Did you mean 'gptq'?"),
        (["--to", "gptq", "--calibration", "/nowhere.txt"], 3, "/nowhere.txt: cannot be read"),
        (["--to", "gptq", "--json", "/nowhere/report.json"], 2, "there is no directory /nowhere"),
        (["--to", "gptq", "--samples", "100000"], 3, "windows of 512, not 100000"),
    ],
)
def test_mistakes_end_with_their_exit_code_and_a_sentence(
    tiny_checkpoint: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert run(["convert", str(tiny_checkpoint("llama")), "--out", str(tmp_path / "out"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_json_on_standard_output_stands_alone(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(tiny_checkpoint("llama")), "--to", "awq", "--out", str(tmp_path / "out")]
    assert run([*arguments, "--dry-run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["num_modules"] == 14
    assert not list(tmp_path.iterdir())


def test_a_calibration_file_that_is_not_needed_is_not_read_and_it_says_so(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(tiny_checkpoint("llama")), "--to", "fp8", "--out", str(tmp_path / "out")]
    assert run([*arguments, "--calibration", "/nowhere.txt"]) == 0
    assert "note: the calibration text is not read" in capsys.readouterr().err


def test_more_threads_than_the_machine_has_do_no_harm(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, out = str(tiny_checkpoint("llama")), str(tmp_path / "out")
    program = f"from aphroquant.cli import main; main(['convert', {source!r}, '--to', 'fp8', '--out', {out!r}, "
    finished = subprocess.run(
        [sys.executable, "-c", program + "'--threads', '100000'])"], capture_output=True, check=False
    )
    assert finished.returncode == 0


@pytest.mark.parametrize("name", ["convert", "eval", "inspect"])
def test_help_does_not_wait_for_torch(name: str) -> None:
    program = f"import sys; from aphroquant.cli import run; run(['{name}', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_a_source_that_is_not_there_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(tmp_path / "nothing"), "--to", "awq", "--out", str(tmp_path / "out")]) == 3
    assert "no such file or directory" in capsys.readouterr().err


def started(source: Path, out: Path) -> subprocess.Popen[str]:
    """A conversion in a process of its own that has begun its blocks and will take a while."""
    program = (
        "import sys, time\n"
        "from aphroquant.conversion import directory_run\n"
        "original = directory_run.DirectoryConversion._write_block\n"
        "def slow(self, *args):\n"
        "    original(self, *args)\n"
        "    print('a block is written', flush=True)\n"
        "    time.sleep(60)\n"
        "directory_run.DirectoryConversion._write_block = slow\n"
        "from aphroquant.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "convert", str(source), "--to", "awq", "--out", str(out), *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    for line in process.stdout:
        if "a block is written" in line:
            return process
    raise AssertionError(f"the conversion ended early: {process.communicate()[1]}")


def test_kill_leaves_nothing_that_looks_complete(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    process = started(tiny_checkpoint("llama"), tmp_path / "out")
    process.kill()
    process.communicate()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".out.partial-{process.pid}", ".out.job"}
    assert not list(tmp_path.rglob("config.json"))
    assert not list((tmp_path / f".out.partial-{process.pid}").glob("*.safetensors"))


def test_an_interrupt_ends_with_130_and_leaves_its_job(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    process = started(tiny_checkpoint("llama"), tmp_path / "out")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert "interrupted" in words
    assert f"the work so far is kept in {tmp_path / '.out.job'}: the same command goes on from it" in words
    assert [path.name for path in tmp_path.iterdir()] == [".out.job"]


def test_a_termination_ends_with_143_and_leaves_its_job(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    process = started(tiny_checkpoint("llama"), tmp_path / "out")
    time.sleep(0.1)
    process.terminate()
    _, words = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in words
    assert [path.name for path in tmp_path.iterdir()] == [".out.job"]


def test_a_loss_has_to_be_allowed_and_the_output_says_which_it_was(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, report = str(tmp_path / "one"), str(tmp_path / "two.gguf"), tmp_path / "report.json"
    assert run(["convert", str(tiny_checkpoint("llama")), "--to", "fp8", "--out", first]) == 0
    assert re.search("^numbers +quantized from a dense source$", capsys.readouterr().out, re.MULTILINE)
    assert run(["convert", first, "--to", "gguf", "--out", second]) == 2
    words = capsys.readouterr().err.splitlines()
    assert words[-2].startswith(
        f"error: {first} is quantized already, and its numbers cannot stay as they are in gguf: "
    )
    assert words[-2].endswith("down_proj: GGUF has no type for fp8 per tensor")
    assert words[-1] == "hint: --requantize dequantizes it and quantizes it anew, with a loss"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert run(["convert", first, "--to", "gguf", "--out", second, "--requantize", "--json", str(report)]) == 0
    outcome = "requantized, because model.layers.0.mlp.down_proj: GGUF has no type for fp8 per tensor"
    assert outcome in capsys.readouterr().out
    assert json.loads(report.read_text())["outcome"] == outcome
    assert run(["convert", second, "--to", "gguf", "--out", str(tmp_path / "three.gguf")]) == 0
    assert "lossless: every one of 16 layers dequantizes to the same bits" in capsys.readouterr().out


def test_leftovers_of_a_killed_conversion_are_removed_by_the_next_of_the_same_name(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(tiny_checkpoint("llama"), tmp_path / "out")
    process.kill()
    process.communicate()
    left = f".out.partial-{process.pid}"
    assert (tmp_path / left).exists()
    assert run(["convert", str(tiny_checkpoint("llama")), "--to", "fp8", "--out", str(tmp_path / "out")]) == 0
    assert f"note: removed {left}, left by a conversion that was killed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_gguf_file_does_not_have_its_name(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom aphroquant.checkpoint import GgufWriter\n"
        "original = GgufWriter.add_rows\n"
        "def slow(self, *args, **more):\n"
        "    original(self, *args, **more)\n    print('rows are written', flush=True)\n    time.sleep(60)\n"
        "GgufWriter.add_rows = slow\nfrom aphroquant.cli import main\nmain(sys.argv[1:])\n"
    )
    arguments = ["convert", str(tiny_checkpoint("llama")), "--to", "gguf", "--out", str(tmp_path / "a.gguf")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "rows are written\n"
    process.kill()
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [f".a.gguf.partial-{process.pid}"]
    assert run(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "a.gguf.aphroquant.json", "a.gguf.sha256"]
