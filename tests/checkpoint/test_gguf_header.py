"""gguf-py judges: it reads every kind of metadata as it was given."""

from pathlib import Path

import gguf
import numpy as np

from aphroquant.checkpoint.gguf_header import ALIGNMENT, encode_header, place
from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.formats.gguf import block_type

METADATA = {
    "general.architecture": "llama",
    "yes": True,
    "no": False,
    "small": 7,
    "large": 2**32 + 1,
    "real": 0.5,
    "text": "é\n\N{GRINNING FACE}",
    "empty": "",
    "strings": ["a", "", "ß"],
    "none": [],
    "types": np.array([1, -2, 3], dtype=np.int32),
    "scores": np.array([0.5, -1.25], dtype=np.float32),
}


def write(path: Path) -> Path:
    tensors = place(
        {"a": (block_type("F32"), (3,)), "b": (block_type("Q4_0"), (5, 64)), "c": (block_type("F16"), (2, 3))}
    )
    last = tensors["c"]
    path.write_bytes(encode_header(METADATA, tensors) + bytes(last.begin + last.nbytes))
    return path


def test_gguf_py_reads_the_metadata(tmp_path: Path) -> None:
    fields = gguf.GGUFReader(write(tmp_path / "a.gguf")).fields
    for key, value in METADATA.items():
        if isinstance(value, list) and not value:
            continue  # gguf-py has no contents of an empty array
        expected = value.tolist() if isinstance(value, np.ndarray) else value
        assert fields[key].contents() == expected, key


def test_the_own_reader_reads_the_metadata(tmp_path: Path) -> None:
    found = read_gguf_header(write(tmp_path / "a.gguf")).metadata
    for key, value in METADATA.items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(found[key], value)
        else:
            assert found[key] == value


def test_tensors_are_aligned_and_of_their_types_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    for tensor in gguf.GGUFReader(path).tensors:
        assert tensor.data_offset % ALIGNMENT == 0
    tensors = read_gguf_header(path).tensors
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in tensors.items()} == {
        "a": ((3,), 12),
        "b": ((5, 64), 5 * 2 * 18),
        "c": ((2, 3), 12),
    }
