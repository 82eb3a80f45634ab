import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.checkpoint.disk import size_text
from aphroquant.conversion import convert
from aphroquant.errors import InputError, ResourceError, UsageError

CONFIG = {"model_type": "llama"}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b.weight": torch.randn(7, 3),
        "scalar": torch.tensor(2.5),
        "odd": torch.randint(0, 255, (13,), dtype=torch.uint8),
        "fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "bf16": torch.randn(9).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "mask": torch.tensor([True, False, True]),
    }


def write(directory: Path, content: dict[str, torch.Tensor], **options: int) -> Path:
    with CheckpointWriter(directory, **options) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)
        return writer.finish(CONFIG)


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def test_one_shard_is_what_the_library_reads_bit_for_bit(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path / "out", content)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    found = safetensors.torch.load_file(path / "model.safetensors")
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert leftovers(tmp_path) == []


def test_many_shards_have_an_index_that_the_library_and_the_reader_agree_with(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path / "out", content, shard_bytes=60)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in content.values())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(path / file)[name].float(), content[name].float())
    checkpoint = open_checkpoint(path)
    assert all(torch.equal(checkpoint.read(name).float(), content[name].float()) for name in content)


def test_a_shard_holds_at_most_its_bytes_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    path = write(
        tmp_path / "out", {f"t{i}": torch.zeros(size) for i, size in enumerate([4, 4, 4, 100, 4])}, shard_bytes=40
    )
    sizes = [
        sum(t.nbytes for t in safetensors.torch.load_file(file).values()) for file in sorted(path.glob("*.safetensors"))
    ]
    assert sizes == [32, 16, 400, 16]


def test_the_same_tensors_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    content = tensors()
    first = write(tmp_path / "a", content)
    second = write(tmp_path / "b", dict(reversed(content.items())))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    path = write(tmp_path / "out", {"a": torch.zeros(3, dtype=torch.uint8), "z": torch.zeros(2, dtype=torch.float64)})
    checkpoint = open_checkpoint(path)
    assert checkpoint._stored["z"][1].begin % 8 == 0  # type: ignore[attr-defined]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path / "out", tensors())
    with pytest.raises(UsageError, match="exists and is not empty") as caught:
        CheckpointWriter(tmp_path / "out")
    assert "--overwrite" in (caught.value.hint or "")


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    old = write(tmp_path / "out", tensors())
    (old / "stale.json").write_text("{}")
    with CheckpointWriter(tmp_path / "out", overwrite=True) as writer:
        writer.add("new", torch.ones(2))
        assert (old / "stale.json").exists()  # until the very end
        writer.finish(CONFIG)
    assert sorted(path.name for path in old.iterdir()) == ["config.json", "model.safetensors"]
    assert list(open_checkpoint(old).tensors) == ["new"]
    assert leftovers(tmp_path) == []


def test_a_failed_overwrite_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write(tmp_path / "out", tensors())
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UsageError, match="Input/output error"), CheckpointWriter(old, overwrite=True) as writer:
        writer.add("new", torch.ones(2))
        writer.finish(CONFIG)
    assert open_checkpoint(old).tensors.keys() == tensors().keys()
    assert leftovers(tmp_path) == []


def test_overwrite_never_removes_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="does not look like a checkpoint"):
        CheckpointWriter(tmp_path / "home", overwrite=True)
    with pytest.raises(UsageError, match="not a directory"):
        CheckpointWriter(tmp_path / "home" / "thesis.tex", overwrite=True)


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert list(open_checkpoint(write(tmp_path / "out", {"a": torch.ones(1)})).tensors) == ["a"]


def test_the_source_can_be_overwritten_while_it_is_read(tmp_path: Path) -> None:
    content = tensors()
    path = write(tmp_path / "out", content)
    source = open_checkpoint(path)
    with CheckpointWriter(path, overwrite=True) as writer:
        for name in source.tensors:
            writer.add(name, source.read(name))
        writer.finish(CONFIG)
    assert torch.equal(open_checkpoint(path).read("b.weight"), content["b.weight"])


def test_carried_files_are_copied_and_cannot_escape(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.add_file(tmp_path / "tokenizer.json")
        writer.add_file(tmp_path / "tokenizer.json", "copy.json")
        writer.write_json("extra.json", {"é": 1})
        for bad in ("../x", "config.json", "model.safetensors", "a/b"):
            with pytest.raises(InputError, match="cannot be the name"):
                writer.add_file(tmp_path / "tokenizer.json", bad)
        with pytest.raises(InputError, match="nowhere: cannot be read"):
            writer.add_file(tmp_path / "nowhere")
        path = writer.finish(CONFIG)
    assert (path / "copy.json").read_text() == "{}"
    assert json.loads((path / "extra.json").read_text()) == {"é": 1}


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(ResourceError, match="the disk is full") as caught,
            CheckpointWriter(tmp_path / "out") as writer,
        ):
            for i in range(10):
                writer.add(f"t{i}", torch.ones(10_000))
            writer.finish(CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_directory_that_looks_complete(tmp_path: Path) -> None:
    code = f"""
import os, signal, torch
from aphroquant.checkpoint import CheckpointWriter
with CheckpointWriter({str(tmp_path / "out")!r}, shard_bytes=1000) as writer:
    for i in range(20):
        writer.add(f"t{{i}}", torch.ones(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".out.partial-")
    assert not (partial / "config.json").exists()
    with pytest.raises(InputError):
        open_checkpoint(partial)


def test_a_link_to_a_directory_is_written_through(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a": torch.ones(1)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", {"b": torch.ones(1)}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert list(open_checkpoint(tmp_path / "real").tensors) == ["b"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_250_000, "1.25 MB"), (5e9, "5.00 GB")],
)
def test_sizes_are_told_in_a_unit_that_fits(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize("name", ["out", "model.gguf"])
def test_a_file_in_the_way_is_named(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    options: dict[str, Any] = {"to": "gguf"} if name.endswith("gguf") else {"to": "awq", "solver": "rtn", "samples": 0}
    with pytest.raises(UsageError, match=r"cannot be made: .*file is not a directory"):
        convert(tiny_checkpoint("llama"), out=tmp_path / "file" / "deeper" / name, **options)
