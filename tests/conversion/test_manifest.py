"""aphroquant.json says which bytes a conversion read and which it wrote, and `inspect --verify` holds it to that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aphroquant
from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.inspection import verify

Tiny = Callable[..., Path]
OF_THEMSELVES = ("aphroquant.json", "README.md", "SHA256SUMS")  # what the manifest cannot, or does not, tell of
ROUND: dict[str, Any] = {"solver": "rtn", "samples": 0}


def records(directory: Path, *without: str) -> dict[str, dict[str, Any]]:
    """What every file in a directory is, as the manifest tells it."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in without:
            content = path.read_bytes()
            found[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return found


def manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def changed(path: Path) -> list[tuple[str, str]]:
    findings = verify(open_checkpoint(path)).findings
    return [(finding.check, finding.subject) for finding in findings if finding.check.startswith("file-")]


@pytest.mark.parametrize("kind", ["quantized", "repacked"])
def test_a_conversion_tells_the_hashes_of_what_it_read_and_wrote(
    kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("llama", torch_dtype="float16", max_shard_size="100KB"), tmp_path / "out"
    assert len(list(source.glob("*.safetensors"))) > 1
    aphroquant.convert(source, to="gptq", out=out, symmetric=True, **ROUND)
    if kind == "repacked":
        source, out = out, tmp_path / "again"
        aphroquant.convert(source, to="awq", out=out)
    told = manifest(out / "aphroquant.json")
    assert told["source_files"] == records(source, *OF_THEMSELVES)
    assert told["files"] == records(out, *OF_THEMSELVES)
    assert changed(out) == []
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    assert changed(out) == [("file-changed", "model.safetensors")]


def test_files_beside_the_weights_are_told_too(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    aphroquant.convert(source, to="awq", out=tmp_path / "out", **ROUND)
    told = manifest(tmp_path / "out" / "aphroquant.json")
    assert "additional_chat_templates/tool.jinja" in told["source_files"]
    assert told["files"] == records(tmp_path / "out", *OF_THEMSELVES)


@pytest.mark.parametrize("scheme", ["q4_k_m", "f16"])
def test_a_gguf_file_s_hash_stands_beside_it(scheme: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    aphroquant.convert(tiny_checkpoint("llama"), to="gguf", out=tmp_path / "m.gguf", scheme=scheme)
    told = manifest(tmp_path / "m.gguf.aphroquant.json")
    assert told["files"] == records(tmp_path, "m.gguf.aphroquant.json", "m.gguf.sha256")
    aphroquant.convert(tmp_path / "m.gguf", to="gguf", out=tmp_path / "again.gguf")
    again = manifest(tmp_path / "again.gguf.aphroquant.json")
    assert again["source_files"] == told["files"]
    moved = tmp_path / "moved.gguf"
    (tmp_path / "m.gguf").rename(moved)
    (tmp_path / "m.gguf.aphroquant.json").rename(tmp_path / "moved.gguf.aphroquant.json")
    (tmp_path / "m.gguf.sha256").rename(tmp_path / "moved.gguf.sha256")
    assert changed(moved) == []
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    assert changed(moved) == [("file-changed", "moved.gguf")]


def test_several_shards_are_hashed_under_the_names_that_they_get(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    with CheckpointWriter(tmp_path / "out", shard_bytes=2**16, hashed=True) as writer:
        for name in source.tensors:
            writer.add(name, source.read(name))
        found = writer.records(source.config)
        writer.finish(source.config)
    assert len(found) > 4
    assert {name: record._asdict() for name, record in found.items()} == records(tmp_path / "out")
