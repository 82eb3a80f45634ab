"""gguf-py judges: what it quantizes or dequantizes, this decoder reads to the same bits."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.formats.gguf import BLOCK_TYPES, BlockType, decode
from aphroquant.schemes import IntegerScheme, KQuantScheme

TYPES = {block_type.name: (type_id, block_type) for type_id, block_type in BLOCK_TYPES.items()}


def judge(name: str, data: np.ndarray) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    different = (found.view(torch.int32) != expected.view(torch.int32)) & ~(found.isnan() & expected.isnan())
    assert not different.any(), f"first difference at {different.nonzero()[0].tolist()}"


def random_blocks(block_type: BlockType, rows: int, blocks: int) -> np.ndarray:
    """Random bytes with finite, ordinary scales: any code and any sub-scale occurs."""
    data = np.random.randint(0, 256, (rows, blocks, block_type.block_bytes), dtype=np.uint8)
    scales = np.random.randn(rows, blocks, 2).astype(np.float16).view(np.uint8)
    if block_type.name == "Q6_K":
        data[..., -2:] = scales[..., :2]
    else:
        data[..., :4] = scales
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("F32", "F16", "BF16")])
@pytest.mark.parametrize(("rows", "super_blocks"), [(1, 1), (3, 2), (5, 7)])
def test_any_blocks_dequantize_to_gguf_pys_bits(name: str, rows: int, super_blocks: int) -> None:
    block_type = TYPES[name][1]
    columns = super_blocks * 256
    data = random_blocks(block_type, rows, columns // block_type.block_size)
    weight = decode(block_type, torch.from_numpy(data).reshape(-1), (rows, columns))
    weight.check("weight")
    assert_same_bits(weight.dequantize(), judge(name, data))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_what_gguf_py_quantizes_is_read_back_to_its_bits(name: str) -> None:
    dense = np.random.randn(6, 96).astype(np.float32)
    dense[2] = 0
    data = gguf.quants.quantize(dense, gguf.GGMLQuantizationType[name])
    stored = torch.from_numpy(np.ascontiguousarray(data)).view(torch.uint8).reshape(-1)
    weight = decode(TYPES[name][1], stored, (6, 96))
    weight.check("weight")
    assert_same_bits(weight.dequantize(), judge(name, data))


@pytest.mark.parametrize("name", TYPES)
def test_type_ids_and_sizes_are_gguf_pys(name: str) -> None:
    type_id, block_type = TYPES[name]
    kind = gguf.GGMLQuantizationType[name]
    assert type_id == kind.value
    assert (block_type.block_size, block_type.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_codes_are_unsigned_with_true_zero_points() -> None:
    data = gguf.quants.quantize(np.zeros((1, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    weight = decode(TYPES["Q8_0"][1], torch.from_numpy(data).reshape(-1), (1, 32))
    assert weight.scheme == IntegerScheme(8, 32, symmetric=True)
    assert weight["codes"].unique().tolist() == [128]


def test_q4_1_minima_stay_real_numbers() -> None:
    dense = np.linspace(-1, 2, 64, dtype=np.float32).reshape(1, 64)
    data = gguf.quants.quantize(dense, gguf.GGMLQuantizationType.Q4_1)
    weight = decode(TYPES["Q4_1"][1], torch.from_numpy(data).reshape(-1), (1, 64))
    assert weight.scheme == IntegerScheme(4, 32, symmetric=False, has_offsets=True)
    assert weight["offsets"].dtype == torch.float16
    assert weight["offsets"].flatten().tolist() == pytest.approx([dense[0, 0], dense[0, 32]], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bits_per_weight"), [("Q4_0", 4.5), ("Q4_1", 5), ("Q8_0", 8.5), ("Q4_K", 4.5), ("Q6_K", 6.5625)]
)
def test_the_canonical_form_needs_as_many_bits_as_the_file(name: str, bits_per_weight: float) -> None:
    block_type = TYPES[name][1]
    data = random_blocks(block_type, 2, 512 // block_type.block_size)
    weight = decode(block_type, torch.from_numpy(data).reshape(-1), (2, 512))
    assert weight.num_bits / 1024 == bits_per_weight
    assert isinstance(weight.scheme, IntegerScheme | KQuantScheme)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]), st.data())
def test_even_nonsense_bytes_agree(name: str, data: st.DataObject) -> None:
    block_type = TYPES[name][1]
    content = data.draw(st.binary(min_size=block_type.block_bytes, max_size=block_type.block_bytes))
    blocks = np.frombuffer(content, np.uint8).reshape(1, -1)
    weight = decode(block_type, torch.tensor(list(content), dtype=torch.uint8), (1, block_type.block_size))
    assert_same_bits(weight.dequantize(), judge(name, blocks))
