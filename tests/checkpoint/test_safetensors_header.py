"""The safetensors library judges: what it writes is read, and what this reader accepts it accepts too."""

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.safetensors_header import DTYPES, read_header
from aphroquant.errors import InputError

LIBRARY_DTYPES = sorted(set(DTYPES) - {"F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("name", LIBRARY_DTYPES)
def test_every_dtype_of_the_library_is_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    tensors = {"a": random_bits(DTYPES[name], (3, 5)), "scalar": random_bits(DTYPES[name], ())}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for key, tensor in tensors.items():
        found = checkpoint.read(key)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(bits(found), bits(tensor))


def test_e8m0_scales_are_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"s": entry("F8_E8M0", [2, 2], 0, 4)}, bytes([126, 127, 128, 130]))
    assert open_checkpoint(tmp_path / "x.safetensors").read("s").float().tolist() == [[0.5, 1.0], [2.0, 8.0]]


def test_empty_tensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"e": torch.empty(0, 7), "f": torch.ones(2)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.read("e").shape == (0, 7)
    assert checkpoint.read("f").tolist() == [1.0, 1.0]


def test_a_read_tensor_is_the_callers_own(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").tolist() == [1.0] * 4


def test_one_tensor_of_a_file_larger_than_memory_is_read_alone(tmp_path: Path) -> None:
    size = 2**40
    header = {"huge": entry("U8", [size], 0, size), "small": entry("U8", [3], size, size + 3)}
    path = write_raw(tmp_path / "x.safetensors", header)
    begin = path.stat().st_size
    with path.open("rb+") as file:
        try:
            file.truncate(begin + size + 3)  # sparse: takes no space on the disk
        except OSError:
            pytest.skip("the file system has no sparse files of 1 TB")
        file.seek(begin + size)
        file.write(b"\1\2\3")
    assert open_checkpoint(path).read("small").tolist() == [1, 2, 3]


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(400)}, path)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(InputError, match=r"x\.safetensors: a: the file ends 7 bytes too early"):
        checkpoint.read("a")


BAD_HEADERS = {
    "ends outside": ({"a": entry("F32", [4], 0, 16)}, bytes(8), "outside the file's 8 bytes"),
    "wrong size": ({"a": entry("F32", [3], 0, 16)}, bytes(16), r"F32 \[3\] needs 12 bytes, but data_offsets hold 16"),
    "overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, bytes(6), "b: .* overlaps"),
    "gap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 6, 10)}, bytes(10), "b: .* leaves a gap"),
    "tail": ({"a": entry("U8", [4], 0, 4)}, bytes(9), "5 bytes after the last tensor"),
    "negative": ({"a": entry("U8", [-4], 0, 4)}, bytes(4), "must be lists of counts"),
    "bool size": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1), "lists of counts"),
    "huge shape": ({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}, b"", "too large"),
    "reversed": ({"a": entry("U8", [0], 4, 0)}, bytes(4), "outside"),
    "dtype": ({"a": entry("F3", [1], 0, 1)}, bytes(1), "dtype 'F3' is not supported; known are BOOL, U8"),
    "missing key": ({"a": {"dtype": "U8", "shape": [1]}}, bytes(1), "needs exactly dtype, shape and data_offsets"),
    "array": (b"[]", b"", "no JSON object"),
    "duplicate": (b'{"a":1,"a":2}', b"", "duplicate key 'a'"),
    "control": (b'{"a\\u001b[2J":1}', b"", "unprintable"),
    "surrogate": (b'{"a\\ud800":1}', b"", "unprintable"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "not utf-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_contradicting_header_is_an_input_error_naming_it(case: str, tmp_path: Path) -> None:
    header, data, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in caught.value.message


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_a_header_longer_than_its_file_is_refused_before_reading(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"too short|claims \d+ bytes in a file of"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_never_wider_than_the_library(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    content = bytearray(safetensors.torch.save(tensors, {"format": "pt"}))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        found = {name: checkpoint.read(name) for name in checkpoint.tensors}
    except InputError as error:
        assert "fuzz.safetensors" in error.message
        return
    expected = safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in found)
