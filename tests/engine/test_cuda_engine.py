"""The engine on a GPU: what needs no GPU of it, and the whole where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant import LLM, SamplingParams
from aphroquant.checkpoint import open_checkpoint
from aphroquant.engine.batch import pack
from aphroquant.engine.cuda.buckets import batch_buckets, bucket_for
from aphroquant.engine.cuda.joining import join_biases, join_weights
from aphroquant.engine.cuda.linears import Part, joint_linear
from aphroquant.engine.cuda.loading import cache_room
from aphroquant.engine.cuda.metadata import DecodeBuffers, is_decode_only, num_leading_decodes
from aphroquant.engine.sequence import Sequence
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import UsageError
from aphroquant.kernels.random_weights import random_weight
from aphroquant.kernels.reference.linear import ReferenceLinear
from aphroquant.schemes import FloatScheme, IntegerScheme, KQuantScheme, LookupScheme, QuantizedWeight, Scheme

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
BLOCK_SIZE = 16


def test_buckets_grow_with_the_batch_and_hold_the_largest() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(5) == [1, 2, 4, 5]
    assert batch_buckets(64) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert batch_buckets(10_000)[-1] == 512
    assert [bucket_for(count, [1, 2, 4, 8]) for count in (1, 3, 8, 9)] == [1, 4, 8, None]


def integer_weight(rows: int, columns: int, *, symmetric: bool = True, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    scheme = IntegerScheme(4, 32, symmetric)
    tensors = {
        "codes": torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8),
        "scales": torch.rand(rows, columns // 32, generator=generator).half(),
    }
    if not symmetric:
        tensors["zeros"] = torch.randint(0, 16, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(scheme, tensors, (rows, columns))


def test_joined_weights_are_the_same_numbers_one_below_the_other() -> None:
    parts = [integer_weight(rows, 64, seed=rows) for rows in (8, 3, 5)]
    joined = join_weights(parts)
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_per_tensor_scales_become_per_channel_when_joined() -> None:
    parts = [
        QuantizedWeight(
            FloatScheme("tensor"),
            {"codes": torch.randn(rows, 16).to(torch.float8_e4m3fn), "scales": torch.tensor(scale)},
            (rows, 16),
        )
        for rows, scale in ((4, 0.5), (6, 0.25))
    ]
    joined = join_weights(parts)
    assert joined is not None
    assert joined.scheme == FloatScheme("channel")
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    "scheme",
    [
        KQuantScheme("q4_k"),
        KQuantScheme("q6_k"),
        LookupScheme("nf4", 64, "float", flattened=True),
        LookupScheme("nf4", 64, "nested", flattened=True),
        LookupScheme("e2m1", 32, "e8m0"),
    ],
    ids=str,
)
def test_super_blocks_and_lookup_weights_are_joined(scheme: Scheme) -> None:
    parts = [random_weight(scheme, rows, 256) for rows in (8, 3, 5)]
    joined = join_weights(parts)
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_global_scales_are_joined_only_where_they_are_the_same() -> None:
    first = random_weight(LookupScheme("e2m1", 16, "e4m3"), 4, 32)
    second = QuantizedWeight(first.scheme, {**first.tensors, "global_scale": first["global_scale"] * 2}, first.shape)
    assert join_weights([first, second]) is None
    joined = join_weights([first, first])
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize()] * 2))


def test_blocks_that_cross_rows_are_not_joined() -> None:
    scheme = LookupScheme("nf4", 64, "float", flattened=True)
    assert join_weights([random_weight(scheme, 8, 72), random_weight(scheme, 8, 72)]) is None


def test_neighbours_of_one_scheme_are_joined_beside_another() -> None:
    prepared: list[int] = []

    def prepare(weight: QuantizedWeight, bias: Tensor | None) -> ReferenceLinear:
        prepared.append(weight.shape[0])
        return ReferenceLinear(weight, bias)

    four, six = KQuantScheme("q4_k"), KQuantScheme("q6_k")
    weights = [random_weight(scheme, rows, 256) for scheme, rows in ((four, 8), (four, 4), (six, 4))]
    biases = [torch.randn(8), None, torch.randn(4)]
    parts = [Part(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    x = torch.randn(3, 256)
    expected = torch.cat([ReferenceLinear(*part)(x) for part in parts], 1)
    torch.testing.assert_close(joint_linear(parts, prepare, CPU, torch.float32)(x), expected)
    assert prepared == [12, 4]


def test_weights_of_different_numbers_are_not_joined() -> None:
    assert join_weights([integer_weight(8, 64), integer_weight(8, 64, symmetric=False)]) is None
    assert join_weights([integer_weight(8, 64), QuantizedWeight.dense(torch.zeros(8, 64))]) is None
    blocks = [
        QuantizedWeight(
            FloatScheme("block", (16, 16)),
            {"codes": torch.zeros(24, 16).to(torch.float8_e4m3fn), "scales": torch.ones(2, 1)},
            (24, 16),
        )
        for _ in range(2)
    ]
    assert join_weights(blocks) is None  # a block of the first would reach into the second


def test_a_missing_bias_joins_as_zeros() -> None:
    assert join_biases([None, None], [2, 3]) is None
    joined = join_biases([None, torch.ones(3)], [2, 3])
    assert joined is not None
    assert joined.tolist() == [0, 0, 1, 1, 1]


def sequence(tokens: list[int], blocks: list[int], num_computed: int) -> Sequence:
    made = Sequence(tokens)
    made.add_blocks(blocks)
    made.num_computed = num_computed
    return made


def test_decode_buffers_pad_with_sequences_that_store_and_see_nothing() -> None:
    buffers = DecodeBuffers(8, 4, CPU)
    batch = pack([(sequence([5, 6, 7], [2], 2), 1), (sequence(list(range(20)), [1, 3], 19), 1)], BLOCK_SIZE)
    assert is_decode_only(batch)
    buffers.fill(batch, 4)
    inputs = buffers.inputs(4, splits=2)
    assert inputs.token_ids.tolist() == [7, 19, 0, 0]
    assert inputs.slots.tolist() == [2 * 16 + 2, 3 * 16 + 3, -1, -1]
    assert inputs.context_lens.tolist() == [3, 20, 0, 0]
    assert inputs.block_tables[:2, :2].tolist() == [[2, 0], [1, 3]]
    later = pack([(sequence(list(range(17)), [2, 6], 16), 1)], BLOCK_SIZE)
    buffers.fill(later, 1)
    assert buffers.inputs(1, splits=2).block_tables[0, :2].tolist() == [2, 6]


def test_sequences_of_one_token_in_front_are_decoded() -> None:
    assert num_leading_decodes([1, 1, 5, 1]) == 2
    assert num_leading_decodes([1, 1]) == 2
    assert num_leading_decodes([]) == 0


def test_the_cache_gets_what_weights_activations_and_the_reserve_leave(tiny_checkpoint: TinyCheckpoint) -> None:
    spec = open_checkpoint(str(tiny_checkpoint("llama"))).spec
    total = 80 * 2**30
    room = cache_room(EngineConfig("m"), spec, 60 * 2**30, total)
    assert 0.8 * 52 * 2**30 < room < 52 * 2**30
    assert cache_room(EngineConfig("m"), spec, 2**30, total) == 0
    assert cache_room(EngineConfig("m", gpu_memory_utilization=0.5), spec, 60 * 2**30, total) < room


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device"),
        ({"dtype": "float32"}, "dtype"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization"),
        ({"device": "cuda", "backend": "cpu"}, "backend"),
        ({"device": "cpu", "backend": "cuda"}, "backend"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig("m", **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_where_there_is_none_says_so(tiny_checkpoint: TinyCheckpoint) -> None:
    with pytest.raises(UsageError, match=r"device cuda cannot be used: torch .* sees no GPU"):
        LLM(str(tiny_checkpoint("llama")), device="cuda")


def gpu_tokens(path: Path, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    llm = LLM(str(path), device="cuda", num_kv_blocks=64, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return [generation.token_ids for generation in llm.generate(prompts, sampling)]


@pytest.fixture
def gpu() -> None:
    from aphroquant.engine.cuda.choice import gpu_obstacle

    if reason := gpu_obstacle():
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("family", "head_dim"), [("llama", 32), ("qwen2", 64), ("qwen3", 32), ("llama", 128)])
def test_answers_on_the_gpu_are_likeliest_by_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, head_dim: int
) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint(family, head_dim=head_dim)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [[5, 9, 77, 30], list(range(3, 43))]
    for prompt, tokens in zip(prompts, gpu_tokens(path, prompts, dtype="float16"), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 2e-2


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_batch_and_the_chunks_of_a_prompt_do_not_matter(tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint("llama", head_dim=32)
    prompts = [list(range(3, 3 + size)) for size in (4, 50, 17)]
    alone = [gpu_tokens(path, [prompt], dtype="float16")[0] for prompt in prompts]
    assert gpu_tokens(path, prompts, dtype="float16") == alone
    assert gpu_tokens(path, prompts, dtype="float16", max_num_batched_tokens=7) == alone


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_steps_that_begin_ahead_give_the_tokens_of_steps_that_wait(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(tiny_checkpoint("llama", head_dim=32)), device="cuda", num_kv_blocks=64, dtype="float16")
    prompts = [list(range(3, 3 + size)) for size in (4, 50, 17, 9)]
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(temperature=temperature, top_p=0.9, seed=7, max_tokens=30, ignore_eos=True)
        ahead = [generation.token_ids for generation in llm.generate(prompts, sampling)]
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine._scheduler, "make_room_ahead", lambda step, sequences: False)
            assert [generation.token_ids for generation in llm.generate(prompts, sampling)] == ahead
