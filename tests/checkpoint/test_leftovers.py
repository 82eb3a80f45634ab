"""What killed writers leave is removed by the next of the same name; what living ones write is not touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aphroquant.checkpoint import CheckpointWriter
from aphroquant.checkpoint.leftovers import remove_leftovers
from aphroquant.errors import UsageError


@pytest.fixture
def dead() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[int]:
    """The number of a process that is writing the checkpoint `out`."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom aphroquant.checkpoint import CheckpointWriter\n"
        "with CheckpointWriter(Path(sys.argv[1])):\n    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process.pid
    process.kill()
    process.communicate()


def test_files_and_directories_of_dead_writers_are_removed(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".out.partial-{dead}").mkdir()
    (tmp_path / f".out.partial-{dead}" / "shard-00001.spool").write_text("x")
    (tmp_path / f".out.gguf.partial-{dead}").write_text("x")
    assert remove_leftovers(tmp_path / "out") == [f"removed .out.partial-{dead}, left by a conversion that was killed"]
    assert len(remove_leftovers(tmp_path / "out.gguf")) == 1
    assert not list(tmp_path.iterdir())


def test_other_names_are_left_alone(tmp_path: Path, dead: int) -> None:
    names = [f".out2.partial-{dead}", f".out.partial-{dead}x", ".out.partial-", f"out.partial-{dead}", ".out.partial-²"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f".out.partial-{dead}").symlink_to(tmp_path / "elsewhere")
    assert remove_leftovers(tmp_path / "out") == []
    assert len(list(tmp_path.iterdir())) == len(names) + 2


def test_names_with_pattern_characters_are_taken_literally(tmp_path: Path, dead: int) -> None:
    (tmp_path / f".o.partial-{dead}").mkdir()
    (tmp_path / f".[o].partial-{dead}").mkdir()
    assert len(remove_leftovers(tmp_path / "[o]")) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f".o.partial-{dead}"]


def test_what_a_living_process_writes_stays(tmp_path: Path, alive: int) -> None:
    assert remove_leftovers(tmp_path / "out") == []
    partial = tmp_path / f".out.partial-{alive}"
    assert partial.is_dir()
    # Under this process's own number, as in two containers that share a directory.
    partial.rename(tmp_path / f".out.partial-{os.getpid()}")
    with pytest.raises(UsageError, match="is being written by another process"), CheckpointWriter(tmp_path / "out"):
        pass


def test_a_checkpoint_that_was_put_aside_comes_back(tmp_path: Path, dead: int) -> None:
    aside = tmp_path / f".out.replaced-{dead}"
    aside.mkdir()
    (aside / "config.json").write_text("{}")
    assert "put out back" in remove_leftovers(tmp_path / "out")[0]
    assert (tmp_path / "out" / "config.json").exists()
    aside.mkdir()
    assert remove_leftovers(tmp_path / "out") == []  # its successor stands
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
