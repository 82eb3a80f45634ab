"""gguf-py judges: what it quantizes or dequantizes, this decoder reads to the same bits."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aphroquant.errors import UsageError
from aphroquant.formats.gguf import BLOCK_TYPES, UNREADABLE_TYPES, BlockType, block_type, decode, encode, type_for_rows
from aphroquant.schemes import IntegerScheme

TYPES = {kind.name: (type_id, kind) for type_id, kind in BLOCK_TYPES.items()}
QUANTIZED = [name for name in TYPES if name not in ("F32", "F16", "BF16")]


def judge(name: str, data: np.ndarray) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    same_zeros = (found == 0) & (expected == 0)  # gguf-py has no negative zero in E2M1
    different = (found.view(torch.int32) != expected.view(torch.int32)) & ~(found.isnan() & expected.isnan())
    different &= ~same_zeros
    assert not different.any(), f"first difference at {different.nonzero()[0].tolist()}"


HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
}


def random_blocks(kind: BlockType, rows: int, blocks: int) -> np.ndarray:
    """Random bytes with finite, ordinary scales: any code and any sub-scale occurs."""
    data = np.random.randint(0, 256, (rows, blocks, kind.block_bytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        data[..., 0] = np.random.randint(0, 250, (rows, blocks))
    elif kind.name == "NVFP4":
        data[..., :4] &= 127
    else:
        for begin in HALVES.get(kind.name, (0,)):
            data[..., begin : begin + 2] = np.random.randn(rows, blocks, 1).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize(("rows", "super_blocks"), [(1, 1), (3, 2), (5, 7)])
def test_any_blocks_dequantize_to_gguf_pys_bits(name: str, rows: int, super_blocks: int) -> None:
    kind = TYPES[name][1]
    columns = super_blocks * 256
    data = random_blocks(kind, rows, columns // kind.block_size)
    weight = decode(kind, torch.from_numpy(data).reshape(-1), (rows, columns))
    weight.check("weight")
    assert_same_bits(weight.dequantize(), judge(name, data))


@pytest.mark.parametrize("name", TYPES)
def test_encoding_is_the_inverse_of_decoding(name: str) -> None:
    kind = TYPES[name][1]
    data = torch.from_numpy(random_blocks(kind, 3, 512 // kind.block_size))
    if name == "NVFP4":
        data.view(3, -1, 36)[..., :4][data.view(3, -1, 36)[..., :4] == 127] = 0  # the one code that is read as zero
    encoded = encode(kind, decode(kind, data.reshape(-1), (3, 512)))
    assert torch.equal(encoded, data)
    assert kind.row_bytes(512) == data.shape[1]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
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
    type_id, kind = TYPES[name]
    theirs = gguf.GGMLQuantizationType[name]
    assert type_id == theirs.value
    assert (kind.block_size, kind.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_every_other_type_of_gguf_py_has_a_name_for_messages() -> None:
    others = {kind.value: kind.name for kind in gguf.GGMLQuantizationType if kind.value not in BLOCK_TYPES}
    assert others.items() <= UNREADABLE_TYPES.items()


def test_types_are_found_by_name_in_any_case_and_misspellings_get_a_hint() -> None:
    assert block_type("q4_k") is TYPES["Q4_K"][1]
    with pytest.raises(UsageError, match="unknown GGUF type 'Q4K'") as caught:
        block_type("Q4K")
    assert "Did you mean 'Q4_K'?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q2_K", 96, "IQ4_NL"),
        ("NVFP4", 96, "Q8_0"),
        ("Q8_0", 40, "F16"),
        ("BF16", 7, "BF16"),
    ],
)
def test_rows_that_are_no_whole_blocks_get_a_smaller_block(name: str, columns: int, expected: str) -> None:
    assert type_for_rows(block_type(name), columns).name == expected


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


def test_an_exponent_of_all_ones_is_no_number_as_the_microscaling_formats_say() -> None:
    block = torch.full((17,), 0x11, dtype=torch.uint8)
    block[0] = 255
    assert decode(TYPES["MXFP4"][1], block, (1, 32)).dequantize().isnan().all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_canonical_form_needs_as_many_bits_as_the_file(name: str) -> None:
    kind = TYPES[name][1]
    data = random_blocks(kind, 2, 512 // kind.block_size)
    weight = decode(kind, torch.from_numpy(data).reshape(-1), (2, 512))
    global_scale = 32 if name == "NVFP4" else 0
    assert weight.num_bits - global_scale == data.size * 8


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([name for name in QUANTIZED if name not in ("MXFP4", "NVFP4")]), st.data())
def test_even_nonsense_bytes_agree(name: str, data: st.DataObject) -> None:
    kind = TYPES[name][1]
    content = data.draw(st.binary(min_size=kind.block_bytes, max_size=kind.block_bytes))
    blocks = np.frombuffer(content, np.uint8).reshape(1, -1)
    weight = decode(kind, torch.tensor(list(content), dtype=torch.uint8), (1, kind.block_size))
    assert_same_bits(weight.dequantize(), judge(name, blocks))
