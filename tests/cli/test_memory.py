"""Memory that is refused ends every command with exit code 5 and one sentence, and leaves nothing half written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint.safetensors_header import StoredTensor, encode_header, read_header
from aphroquant.cli import run
from aphroquant.errors import is_out_of_memory

Tiny = Callable[..., Path]
LIMIT = 2 * 2**30  # of address space: more than all imports take, less than they and one of the layers
WIDTH = 2**24  # of the layers, which take 2 GiB each, as a file with holes
TIMEOUT = 120


@pytest.fixture
def huge(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A model whose feed-forward layers are larger than the limit. On the disk it takes nothing."""
    source = tmp_path / "huge"
    shutil.copytree(tiny_checkpoint("llama", torch_dtype="float16"), source)
    config = json.loads((source / "config.json").read_text())
    config |= {"intermediate_size": WIDTH, "num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    tensors, begin = {}, 0
    for name, tensor in read_header(source / "model.safetensors").tensors.items():
        if "layers.1." in name:
            continue
        old = 128  # the tiny model's width
        shape = tuple(WIDTH if "mlp" in name and size == old else size for size in tensor.shape)
        nbytes = torch.Size(shape).numel() * tensor.dtype.itemsize
        tensors[name] = StoredTensor(tensor.dtype, shape, begin, nbytes)
        begin += nbytes
    header = encode_header(tensors, {"format": "pt"})
    with (source / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + begin)
    return source


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


COMMANDS = {
    "convert": ["convert", "{}", "--to", "gptq", "--samples", "2", "--seq-len", "16", "--solver", "gptq", "--out", "o"],
    "eval": ["eval", "{}", "--against", "{}", "--windows", "1", "--window-len", "16"],
    "serve": ["serve", "{}", "--port", "0"],
    "bench": ["bench", "engine", "{}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_gets_no_memory_says_so(name: str, huge: Path, tmp_path: Path) -> None:
    arguments = [argument.format(huge) for argument in COMMANDS[name]]
    place = tmp_path / "work"
    place.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "aphroquant", *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        preexec_fn=limited,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 5, done.stderr[-2000:]
    *_, error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert "memory" in error
    assert hint.startswith("hint: ")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
    ids=repr,
)
def test_every_way_to_say_so_is_known(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    assert is_out_of_memory(error)
    monkeypatch.setattr("aphroquant.checkpoint.open_checkpoint", fail)
    assert run(["inspect", "x"]) == 5
    assert capsys.readouterr().err.startswith("error: out of memory\nhint: ")


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("aphroquant.checkpoint.open_checkpoint", fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(["inspect", "x"])


@pytest.mark.parametrize("command", ["inspect", "inspect --json -", "inspect --json /dev/full"])
def test_no_room_for_what_is_printed_ends_in_a_sentence(tiny_checkpoint: Tiny, command: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    name, *options = command.split()
    arguments = [sys.executable, "-m", "aphroquant", name, str(tiny_checkpoint("llama")), *options]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=TIMEOUT)
    assert ended.returncode == 5
    assert "the disk is full\nhint: " in ended.stderr
    assert "Traceback" not in ended.stderr
