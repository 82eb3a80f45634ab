"""Hostile and damaged GGUF headers: always an InputError that names the file, never a large allocation."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.errors import InputError

Tiny = Callable[..., Path]
HUGE = 2**63


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def header(
    pairs: bytes = b"", num_pairs: int = 0, tensors: bytes = b"", num_tensors: int = 0, version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs) + pairs + tensors


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pad(content: bytes, data: bytes = b"") -> bytes:
    return content + bytes(-len(content) % 32) + data


HOSTILE = {
    "empty": (b"", "is empty"),
    "magic": (b"GGUX" + bytes(20), "not a GGUF file"),
    "short": (b"GG", "needs 4 bytes"),
    "version 1": (header(version=1), "version 1 GGUF is not supported"),
    "big-endian": (header(version=3 << 24), "big-endian GGUF is not supported"),
    "tensor count": (header(num_tensors=HUGE), "the number of tensors is 9223372036854775808, more than"),
    "pair count": (header(num_pairs=2**64 - 1), "the number of metadata entries is"),
    "string length": (header(struct.pack("<Q", HUGE), 1) + bytes(20), "a metadata key needs"),
    "value type": (header(string("k") + struct.pack("<I", 99), 1), "k has the unknown type 99"),
    "array count": (header(string("k") + struct.pack("<IIQ", 9, 6, 2**62), 1), f"k needs {2**64} bytes"),
    "string count": (header(string("k") + struct.pack("<IIQ", 9, 8, 2**61), 1), "the length of k is"),
    "nested array": (header(string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(16), 1), "k has the unknown type 9"),
    "not utf-8": (header(string(b"\xff\xfe") + bytes(13), 1), "is not UTF-8"),
    "unprintable": (header(string("\x1b[31m") + bytes(13), 1), "unprintable"),
    "same key": (header((string("k") + struct.pack("<IB", 0, 1)) * 2, 2), "the metadata key k stands twice"),
    "alignment 0": (header(string("general.alignment") + struct.pack("<II", 4, 0), 1), "must be a power of two"),
    "alignment 24": (header(string("general.alignment") + struct.pack("<II", 4, 24), 1), "must be a power of two"),
    "alignment string": (header(string("general.alignment") + struct.pack("<I", 8) + string("x"), 1), "power of two"),
    "0 dimensions": (header(b"", 0, tensor("t", []), 1), "t has 0 dimensions"),
    "5 dimensions": (header(b"", 0, tensor("t", [1] * 5), 1), "t has 5 dimensions"),
    "0 rows": (header(b"", 0, tensor("t", [32, 0]), 1), "no multiple"),
    "partial block": (header(b"", 0, tensor("t", [33], 2), 1), r"no multiple of Q4_0's 32"),
    "overflow": (header(b"", 0, tensor("t", [2**32, 2**32, 2**32, 2**32]), 1), "t needs .* bytes at offset"),
    "unknown type": (header(b"", 0, tensor("t", [32], 16), 1), "tensor type IQ2_XXS, which is not supported"),
    "no such type": (header(b"", 0, tensor("t", [32], 777), 1), "tensor type id 777"),
    "outside": (pad(header(b"", 0, tensor("t", [8]), 1), bytes(31)), "t needs 32 bytes at offset"),
    "offset": (pad(header(b"", 0, tensor("t", [8], offset=HUGE), 1), bytes(32)), "t: the offset is"),
    "unaligned": (
        pad(header(b"", 0, tensor("t", [1], offset=4), 1), bytes(32)),
        "t: the offset is 4, and the tensors before it end at 0",
    ),
    "overlap": (
        pad(header(b"", 0, tensor("t", [16]) + tensor("u", [8], offset=32), 2), bytes(96)),
        "u: the offset is 32, and the tensors before it end at 64",
    ),
    "gap": (
        pad(header(b"", 0, tensor("t", [8]) + tensor("u", [8], offset=64), 2), bytes(96)),
        "u: the offset is 64, and the tensors before it end at 32",
    ),
    "bytes put in": (pad(header(b"", 0, tensor("t", [8]), 1), bytes(33)), "the tensors end at 96, and the file has 97"),
    "bytes after": (pad(header(b"", 0, tensor("t", [4]), 1), bytes(64)), "the tensors end at 80, and the file has 128"),
    "first of three": (
        header(string("split.count") + struct.pack("<IH", 2, 3) + string("split.no") + struct.pack("<IH", 2, 0), 2),
        "is part 1 of a model split into 3 files",
    ),
    "pickle": (b"\x80\x02}q\x00." + bytes(40), "is a pickle, which can run code"),
    "zipped pickle": (b"PK\x03\x04" + bytes(40), "is a pickle, which can run code"),
    "same tensor": (
        pad(header(b"", 0, tensor("t", [8]) + tensor("t", [8], offset=32), 2), bytes(96)),
        "the tensor t stands twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_input_error_without_a_large_allocation(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "x.gguf" in caught.value.message


def test_every_metadata_type_is_read_as_gguf_py_writes_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -3)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_float32("f32", 0.5)
    writer.add_bool("yes", True)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 1e300)
    writer.add_string("text", "é\n")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("strings", ["a", "", "ß"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_gguf_header(tmp_path / "x.gguf").metadata
    ints = metadata.pop("ints")
    assert ints.tolist() == [1, -2, 3]
    assert metadata == {
        "general.architecture": "llama", "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "i32": -70000, "f32": 0.5,
        "yes": True, "u64": 2**63, "i64": -(2**62), "f64": 1e300, "text": "é\n", "strings": ["a", "", "ß"],
    }  # fmt: skip


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf_header(tmp_path / "x.gguf").tensors
    assert {name: stored.shape for name, stored in tensors.items()} == {"a": (3,), "b": (5,)}
    assert tensors["b"].begin - tensors["a"].begin == 256


def test_version_2_files_are_read(tiny_gguf: Tiny, tmp_path: Path) -> None:
    content = bytearray(tiny_gguf("llama").read_bytes())
    content[4:8] = struct.pack("<I", 2)
    (tmp_path / "x.gguf").write_bytes(content)
    assert open_checkpoint(tmp_path / "x.gguf").spec.num_layers == 2


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(
    data: st.DataObject, tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(_small_file(tiny_gguf))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
        for module in checkpoint.schemes():
            checkpoint.weight(module)
        assert checkpoint.spec.num_layers
    except InputError as error:
        assert "fuzz.gguf" in error.message


_CACHE: dict[str, bytes] = {}


def _small_file(tiny_gguf: Tiny) -> bytes:
    """A whole model whose header is most of the file, so that most flips hit the header."""
    if not _CACHE:
        few = {
            "tokenizer.ggml.tokens": ["a", "b"],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [1, 3],
        }
        path = tiny_gguf(
            "llama", "Q8_0", few, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        _CACHE["file"] = path.read_bytes()
    return _CACHE["file"]
