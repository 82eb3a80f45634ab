"""The KV cache is sized from what is free, from what is asked for, and refuses clearly what cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aphroquant.engine import memory
from aphroquant.engine.kv_cache import KVScheme
from aphroquant.engine.memory import available_memory, context_limit, plan_kv_blocks
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import ResourceError, UsageError
from aphroquant.models.spec import DecoderSpec, RopeSpec

SCHEME = KVScheme.named("bfloat16")
BLOCK_BYTES = 2 * 2 * 16 * 8 * 2 * 2  # layers, kv heads, tokens, head_dim, key and value, bytes


def spec(rope: RopeSpec | None = None) -> DecoderSpec:
    return DecoderSpec(
        "llama", 10, 64, 64, 2, 4, 2, 8, 1e-5, 1000, rope or RopeSpec(1e4),
        True, False, False, False, False, (None, None),
    )  # fmt: skip


def plan(**settings: Any) -> tuple[int, int]:
    return plan_kv_blocks(EngineConfig("m", **settings), spec(), SCHEME, 0)


def test_a_given_number_of_blocks_is_taken() -> None:
    assert plan(num_kv_blocks=1000) == (1000, 1000)
    assert plan(num_kv_blocks=3) == (3, 48)  # sequences get shorter instead


def test_given_memory_is_divided_into_blocks() -> None:
    assert SCHEME.bytes_per_block(spec(), 16) == BLOCK_BYTES
    assert plan(kv_cache_memory=10 * BLOCK_BYTES + 5) == (10, 160)


def test_a_share_of_free_memory_is_taken_but_no_more_than_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * BLOCK_BYTES)
    assert plan() == (50, 800)
    assert plan_kv_blocks(EngineConfig("m"), spec(), SCHEME, 40 * BLOCK_BYTES) == (30, 480)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**15)
    assert plan(max_num_seqs=3) == (3 * 63, 1000)
    monkeypatch.setattr(memory, "KV_BYTES", 70 * BLOCK_BYTES)
    assert plan(max_num_seqs=3) == (70, 1000)
    monkeypatch.setattr(memory, "KV_BYTES", 10 * BLOCK_BYTES)
    assert plan(max_num_seqs=3) == (63, 1000)  # one sequence of the full length


@pytest.mark.parametrize("settings", [{"kv_cache_memory": 100}, {"num_kv_blocks": 5, "max_model_len": 81}])
def test_too_little_memory_is_a_resource_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="one sequence needs") as caught:
        plan(**settings)
    assert caught.value.hint is not None


def test_weights_that_do_not_fit_are_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * BLOCK_BYTES)
    with pytest.raises(ResourceError, match="room for 0 tokens"):
        plan_kv_blocks(EngineConfig("m"), spec(), SCHEME, 10**12)


@pytest.mark.parametrize("max_model_len", [0, 1, 1001])
def test_a_length_outside_the_models_limit_is_refused(max_model_len: int) -> None:
    with pytest.raises(UsageError, match="between 2 and the model's limit of 1000"):
        plan(max_model_len=max_model_len)


def test_rope_scaling_extends_the_limit() -> None:
    assert context_limit(spec()) == 1000
    assert context_limit(spec(RopeSpec(1e4, "yarn", {"factor": 4.0, "original_max_position_embeddings": 1000}))) == 4000
    assert (
        context_limit(spec(RopeSpec(1e4, "llama3", {"factor": 8.0, "original_max_position_embeddings": 100}))) == 1000
    )


def test_free_memory_is_positive_and_believable() -> None:
    assert 2**20 < available_memory() < 2**50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 300\ninactive_file 150\n"}, 450),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "600\n",
                "memory/memory.stat": "total_inactive_file 100\n",
            },
            500,
        ),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory._cgroup_available(tmp_path) == expected
