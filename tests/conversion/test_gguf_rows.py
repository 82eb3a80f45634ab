"""GGUF files made in pieces of rows: the same bytes as in one, in memory that does not grow with the matrices."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import aphroquant
from aphroquant.checkpoint import CheckpointWriter, GgufTensorPlan, GgufWriter, open_checkpoint, tensor_io
from aphroquant.conversion import gguf_rows
from aphroquant.errors import ResourceError

Tiny = Callable[..., Path]

# Runs a conversion whose anonymous memory may not grow by more than the limit over what importing took.
_LIMITED = """
import resource, sys
from pathlib import Path
import aphroquant.conversion.run, torch, transformers
transformers.AutoTokenizer, transformers.AutoConfig
torch.ones(2**20).sum()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit = int(status["VmData"].split()[0]) * 1024 + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from aphroquant.cli import run
sys.exit(run(sys.argv[2:]))
"""

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


def in_pieces_and_whole(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(gguf_rows, "PIECE_ELEMENTS", 2**40)
    whole = aphroquant.convert(source, to="gguf", out=folder / "whole.gguf", **options)
    for elements in (1, 9000):  # a row at least, a head of q and k
        monkeypatch.setattr(gguf_rows, "PIECE_ELEMENTS", elements)
        pieces = aphroquant.convert(source, to="gguf", out=folder / f"{elements}.gguf", **options)
        assert Path(pieces.out).read_bytes() == Path(whole.out).read_bytes()
        assert pieces.mode == whole.mode
        if whole.weight_relative_error is None:
            assert pieces.weight_relative_error is None
        else:
            assert pieces.weight_relative_error == pytest.approx(whole.weight_relative_error, rel=1e-6)


@pytest.mark.parametrize("scheme", ["q4_k_m", "q6_k", "q4_0", "f16"])
def test_encoded_pieces_are_the_encoded_whole(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    in_pieces_and_whole(tiny_checkpoint("llama", **WIDE), tmp_path, monkeypatch, scheme=scheme)


@pytest.mark.parametrize(
    "options",
    [
        {"to": "gptq", "symmetric": True},
        {"to": "gptq", "bits": 8, "symmetric": True},
        {"to": "awq"},
        {"to": "compressed-tensors", "scheme": "w8a8-int8"},
    ],
)
def test_repacked_pieces_are_the_repacked_whole(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    source = tmp_path / "quantized"
    made = aphroquant.convert(tiny_checkpoint("llama", **WIDE), out=source, samples=0, solver="rtn", **options)
    assert made.num_modules == 7
    in_pieces_and_whole(source, tmp_path, monkeypatch)


def test_rows_of_another_gguf_file_stay_in_pieces(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.gguf"
    aphroquant.convert(tiny_checkpoint("llama", **WIDE), to="gguf", out=source, scheme="q4_k_m")
    in_pieces_and_whole(source, tmp_path, monkeypatch)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts memory only on Linux")
def test_a_matrix_larger_than_the_memory_allowed_is_encoded(tmp_path: Path, tiny_checkpoint: Tiny) -> None:
    """An embedding of 262 MB in bfloat16, 524 MB in float32, of which no copy may be whole in memory."""
    source = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "source"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1, "vocab_size": 256000,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    square, part = torch.randn(512, 512).bfloat16(), torch.randn(16000, 512).bfloat16()
    with CheckpointWriter(source, overwrite=True) as writer:
        for path in source.glob("tokenizer*"):
            writer.add_file(path)
        writer.add_pieces("model.embed_tokens.weight", torch.bfloat16, (256000, 512), [part] * 16)
        writer.add("model.norm.weight", torch.ones(512).bfloat16())
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            writer.add(f"model.layers.0.{name}_proj.weight", square)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            writer.add(f"model.layers.0.{norm}.weight", torch.ones(512).bfloat16())
        writer.finish(config)
    out = tmp_path / "out.gguf"
    arguments = ["convert", str(source), "--to", "gguf", "--scheme", "f16", "--threads", "2", "--out", str(out)]
    command = [sys.executable, "-c", _LIMITED, str(400 * 10**6), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(out).num_bytes > 262 * 10**6


def test_a_file_that_does_not_hold_what_was_written_is_an_error(
    tmp_path: Path, tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_io, "same_bytes", lambda ours, theirs: False)
    with pytest.raises(ResourceError, match="what was written is not what can be read back"):
        aphroquant.convert(tiny_checkpoint("llama", **WIDE), to="gguf", out=tmp_path / "out.gguf", scheme="q4_0")
    with pytest.raises(ResourceError, match="what was written is not what can be read back"):
        aphroquant.convert(tiny_checkpoint("llama", **WIDE), to="gptq", out=tmp_path / "out", samples=0)
    assert not list(tmp_path.iterdir())


def test_rows_must_come_in_order_and_be_whole_heads(tmp_path: Path, tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama", **WIDE))
    name = "model.layers.0.self_attn.q_proj.weight"
    with GgufWriter(tmp_path / "out.gguf", checkpoint.config, None) as writer:
        writer.plan({name: GgufTensorPlan((256, 256), "Q8_0")})
        weight = checkpoint.read(name)
        with pytest.raises(AssertionError, match="whole heads"):
            writer.encoded(name, weight[:3])
        rows = writer.encoded(name, weight[:128])
        with pytest.raises(AssertionError, match="not the next"):
            writer.add_rows(name, 128, rows)
        writer.add_rows(name, 0, rows)
        with pytest.raises(AssertionError, match="planned but not added"):
            writer.finish()
