"""What is stored is read back within each format's rounding, in the memory layout that compiled code relies on."""

from __future__ import annotations

import math

import pytest
import torch

from aphroquant.engine.kv_cache import KV_FORMATS, KVCache, KVScales, KVScheme
from aphroquant.errors import UsageError
from aphroquant.models.spec import DecoderSpec, RopeSpec

HEADS, HEAD_DIM, NUM_BLOCKS, BLOCK_SIZE = 3, 16, 5, 4
SPEC = DecoderSpec(
    "llama", 10, 64, 64, 2, 3, HEADS, HEAD_DIM, 1e-5, 64, RopeSpec(1e4),
    True, False, False, False, False, (None, None),
)  # fmt: skip
# Largest error of one value, as a share of the largest value of its head vector.
TOLERANCE = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "fp8_e4m3": 2**-4, "int8_per_token_head": 0.51 / 127}


def cache_of(name: str, scales: list[KVScales] | None = None) -> KVCache:
    return KVCache(SPEC, KVScheme.named(name), NUM_BLOCKS, BLOCK_SIZE, scales)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_stored_vectors_are_read_back_within_the_tolerance_of_the_format(name: str) -> None:
    cache = cache_of(name)
    slots = torch.tensor([13, 4, 5, 19, 0])
    k, v = torch.randn(5, HEADS, HEAD_DIM) * 3, torch.randn(5, HEADS, HEAD_DIM)
    cache.store(1, slots, k, v)
    for stored, read in zip((k, v), cache.layer(1).read(torch.arange(NUM_BLOCKS)), strict=True):
        error = ((read[:, slots].transpose(0, 1) - stored).abs() / stored.abs().amax(-1, keepdim=True)).max()
        assert error <= TOLERANCE[name], f"{name}: {error:.4f}"
        untouched = [slot for slot in range(NUM_BLOCKS * BLOCK_SIZE) if slot not in slots.tolist()]
        assert (read[:, untouched] == 0).all()
    assert (cache.keys[0].float() == 0).all(), "another layer was written"


@pytest.mark.parametrize("name", KV_FORMATS)
def test_memory_is_laid_out_as_promised(name: str) -> None:
    cache = cache_of(name)
    num_bytes = 0
    for tensors in (cache.keys, cache.values):
        for tensor in tensors:
            assert tensor.shape == (NUM_BLOCKS, HEADS, BLOCK_SIZE, HEAD_DIM)
            assert tensor.dtype == KV_FORMATS[name].dtype
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0
            num_bytes += tensor.nbytes
    for scales in (*cache.key_scales, *cache.value_scales):
        expected = {"none": None, "head": (HEADS,), "token_head": (NUM_BLOCKS, HEADS, BLOCK_SIZE)}
        assert (None if scales is None else tuple(scales.shape)) == expected[KV_FORMATS[name].scaling]
        if scales is not None and scales.dim() == 3:
            num_bytes += scales.nbytes
    assert cache.num_bytes == num_bytes
    assert cache.capacity_tokens == NUM_BLOCKS * BLOCK_SIZE


def test_int8_scale_is_the_largest_value_over_127_and_codes_round_half_to_even() -> None:
    cache = cache_of("int8_per_token_head")
    k = torch.zeros(1, HEADS, HEAD_DIM)
    k[0, 0, :5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -3.5])
    cache.store(0, torch.tensor([6]), k, k)
    assert cache.keys[0][1, 0, 2, :5].tolist() == [127, 0, 2, 2, -4]
    assert cache.key_scales[0] is not None
    assert cache.key_scales[0][1, :, 2].tolist() == [1.0, 1.0, 1.0]  # a zero vector has scale 1


def test_fp8_saturates_and_rounds_to_nearest_even() -> None:
    cache = cache_of("fp8_e4m3")
    k = torch.zeros(1, HEADS, HEAD_DIM)
    k[0, 0, :7] = torch.tensor([1e6, -math.inf, 17.0, 19.0, 448.0, 460.0, math.nan])
    cache.store(0, torch.tensor([0]), k, k)
    read = cache.layer(0).read(torch.tensor([0]))[0][0, 0, :7]
    assert read[:6].tolist() == [448.0, -448.0, 16.0, 20.0, 448.0, 448.0]
    assert read[6].isnan()


def test_fp8_divides_by_the_scale_of_the_head() -> None:
    key_scale, value_scale = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([4.0, 1.0, 0.25])
    cache = cache_of("fp8_e4m3", [KVScales(key_scale, value_scale)] * 2)
    ones = torch.ones(1, HEADS, HEAD_DIM)
    cache.store(1, torch.tensor([7]), ones, ones)
    assert cache.keys[1].float()[1, :, 3, 0].tolist() == [2.0, 0.5, 1.0]
    assert cache.values[1].float()[1, :, 3, 0].tolist() == [0.25, 1.0, 4.0]
    keys, values = cache.layer(1).read(torch.tensor([1]))
    assert (keys[:, 3] == 1).all()
    assert (values[:, 3] == 1).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "int8_per_token_head", "bfloat16"])
def test_numbers_that_are_none_stay_visible(name: str) -> None:
    cache = cache_of(name)
    k = torch.randn(1, HEADS, HEAD_DIM)
    k[0, 1, 3] = math.nan
    cache.store(0, torch.tensor([2]), k, k)
    read = cache.layer(0).read(torch.tensor([0]))[0]
    assert read[1, 2].isnan().any()
    assert not read[0].isnan().any()


def test_keys_and_values_may_have_different_formats() -> None:
    scheme = KVScheme(KV_FORMATS["int8_per_token_head"], KV_FORMATS["float16"])
    cache = KVCache(SPEC, scheme, NUM_BLOCKS, BLOCK_SIZE)
    assert (cache.keys[0].dtype, cache.values[0].dtype) == (torch.int8, torch.float16)
    assert scheme.bytes_per_block(SPEC, BLOCK_SIZE) == 2 * HEADS * BLOCK_SIZE * (HEAD_DIM + 4 + 2 * HEAD_DIM)
    assert str(scheme) == "int8_per_token_head/float16"


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="int8_per_token_head"):
        KVScheme.named("int3")
