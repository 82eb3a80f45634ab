"""Conversions in pieces: the same numbers as in one, in memory that does not grow with the model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aphroquant.checkpoint import CheckpointWriter, hashes, open_checkpoint, shard, stream
from aphroquant.checkpoint.direct import ALIGNMENT
from aphroquant.checkpoint.directory import SafetensorsCheckpoint
from aphroquant.conversion import convert, dataless
from aphroquant.conversion.ahead import MAX_WORKERS, in_order
from aphroquant.errors import InputError, ResourceError
from aphroquant.inspection import compare
from aphroquant.schemes import QuantizedWeight

Tiny = Callable[..., Path]

# Runs a conversion whose anonymous memory may not grow by more than the limit over what importing took.
_LIMITED = """
import resource, sys
from pathlib import Path
import aphroquant.conversion.run, torch
torch.set_num_threads(1)
torch.ones(8).sum()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = int(status["VmData"].split()[0]) * 1024
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from aphroquant.cli import run
sys.exit(run(sys.argv[2:]))
"""


def write_large(path: Path, num_layers: int) -> None:
    """A dense Llama of some 14 MB a layer, with an embedding of 51 MB."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": num_layers, "vocab_size": 50000,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    square, wide = (512, 512), (2048, 512)
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]}
    matrices = {shape: torch.randn(shape).bfloat16() for shape in {*shapes.values()}}
    with CheckpointWriter(path) as writer:
        writer.add("model.embed_tokens.weight", torch.randn(50000, 512).bfloat16())
        writer.add("model.norm.weight", torch.ones(512).bfloat16())
        for layer in range(num_layers):
            for name, shape in shapes.items():
                writer.add(f"model.layers.{layer}.{name}.weight", matrices[shape])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{layer}.{norm}.weight", torch.ones(512).bfloat16())
        writer.finish(config)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts memory only on Linux")
def test_a_model_larger_than_the_memory_allowed_is_quantized_and_repacked(tmp_path: Path) -> None:
    write_large(tmp_path / "dense", 48)  # 387 MB
    first = [
        "convert",
        str(tmp_path / "dense"),
        "--to",
        "gptq",
        "--symmetric",
        "--samples",
        "0",
        "--out",
        str(tmp_path / "gptq"),
    ]
    second = ["convert", str(tmp_path / "gptq"), "--to", "awq", "--out", str(tmp_path / "awq")]
    for arguments in (first, second):
        command = [sys.executable, "-c", _LIMITED, str(300 * 10**6), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "awq").num_bytes > 10**8


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-block"])
def test_fp8_in_pieces_is_fp8_of_the_whole(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    source = tiny_checkpoint("llama", intermediate_size=320)
    check_same(source, tmp_path, monkeypatch, {"to": "fp8", "scheme": scheme})


@pytest.mark.parametrize("options", [{"to": "gptq", "bits": 3}, {"to": "awq"}, {"to": "compressed-tensors"}])
def test_integers_in_pieces_are_those_of_the_whole(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    check_same(tiny_checkpoint("llama"), tmp_path, monkeypatch, options)


def check_same(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    whole = convert(source, out=folder / "whole", samples=0, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(dataless, "PIECE_ELEMENTS", 700)
    pieces = convert(source, out=folder / "pieces", samples=0, **options)  # type: ignore[arg-type]
    found = compare(open_checkpoint(folder / "whole"), open_checkpoint(folder / "pieces"))
    assert found.verdict == "same bytes"
    assert pieces.mean_relative_error == pytest.approx(whole.mean_relative_error, rel=1e-5)


def test_a_shard_written_once_is_what_the_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    monkeypatch.setattr(shard, "SMALL_BYTES", 0)
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "even": torch.randn(4, 4).bfloat16(),
    }
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in tensors.items():
            writer.add_pieces(name, tensor.dtype, tuple(tensor.shape), tensor.flatten().split(3))  # type: ignore[no-untyped-call]
        writer.finish({})
    file = tmp_path / "out" / "model.safetensors"
    read = safetensors.torch.load_file(file)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert int.from_bytes(file.read_bytes()[:8], "little") == shard.HEADER_ROOM - 8
    assert sorted(open_checkpoint(tmp_path / "out").tensors) == sorted(tensors)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_work_ahead_keeps_the_order_and_the_bound() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1
        return item * item

    items = [(number, 3) for number in range(20)]
    assert list(in_order(items, work, at_once=6)) == [(number, number**2) for number in range(20)]
    assert most <= min(2, MAX_WORKERS)


def test_an_error_ahead_comes_up_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = in_order([(number, 1) for number in range(5)], work)
    assert [next(results), next(results)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_more_is_in_work_while_the_caller_has_a_result() -> None:
    begun = [threading.Event() for _ in range(4)]

    def work(item: int) -> int:
        begun[item].set()
        return item

    for item, _ in in_order([(number, 3) for number in range(4)], work, at_once=3):
        assert all(each.wait(10) for each in begun[: item + 2])


def test_a_source_that_is_cut_while_it_is_read_ahead_is_named(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_checkpoint("llama"), to="gptq", symmetric=True, out=tmp_path / "gptq", samples=0)
    place, fetched = tmp_path / "gptq" / "model.safetensors", SafetensorsCheckpoint.fetched
    cut: list[str] = []

    def cutting(self: SafetensorsCheckpoint, module: str) -> Callable[[], QuantizedWeight]:
        if threading.current_thread().name.startswith("ahead") and not cut:
            os.truncate(place, self.info(f"{module}.qweight").begin + 10)
            cut.append(module)
        return fetched(self, module)

    monkeypatch.setattr(SafetensorsCheckpoint, "fetched", cutting)
    before = threading.active_count()
    with pytest.raises(InputError, match=r"qweight: the file ends \d+ bytes too early"):
        convert(tmp_path / "gptq", to="awq", out=tmp_path / "awq")
    assert cut
    assert threading.active_count() == before
    assert [path.name for path in tmp_path.iterdir() if "awq" in path.name] == []


@pytest.mark.parametrize("options", [{"to": "awq"}, {"to": "fp8"}])
def test_a_disk_that_fills_up_behind_the_work_is_told(
    options: dict[str, Any], tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CHUNK", 2 * ALIGNMENT)
    write = os.pwrite

    def full(descriptor: int, content: memoryview, position: int) -> int:
        if position >= shard.HEADER_ROOM + 10 * ALIGNMENT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, position)

    source, before = tiny_checkpoint("llama"), threading.active_count()
    monkeypatch.setattr("aphroquant.checkpoint.tensor_io.os.pwrite", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        convert(source, out=tmp_path / "out", samples=0, **options)
    assert threading.active_count() == before
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"to": "gptq", "symmetric": True}, {"to": "awq"}),
        ({"to": "fp8", "scheme": "fp8-dynamic"}, {"to": "compressed-tensors"}),
        ({"to": "bitsandbytes"}, None),
        ({"to": "compressed-tensors", "ignore": ["*.o_proj"]}, {"to": "gptq"}),
    ],
)
def test_no_shard_is_read_again_for_its_hash(
    first: dict[str, Any], second: dict[str, Any] | None, tiny_checkpoint: Tiny, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shard, "SMALL_BYTES", 0)
    read: list[Path] = []
    record = hashes.FileHashes._record
    monkeypatch.setattr(hashes.FileHashes, "_record", lambda *given: read.append(given[1]) or record(*given))
    convert(tiny_checkpoint("llama"), out=tmp_path / "first", samples=0, **first)
    if second is not None:
        convert(tmp_path / "first", out=tmp_path / "second", **second)
    assert not [path for path in read if path.name.startswith("shard-")]
    content = (tmp_path / ("second" if second else "first") / "model.safetensors").read_bytes()
    told = json.loads((tmp_path / ("second" if second else "first") / "aphroquant.json").read_text())["files"]
    assert told["model.safetensors"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
