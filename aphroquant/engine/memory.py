"""How much memory there is, and how many KV blocks of it an engine takes."""

from __future__ import annotations

import os
from pathlib import Path

from aphroquant.engine.kv_cache import KVScheme
from aphroquant.engine.types import EngineConfig
from aphroquant.errors import ResourceError, UsageError
from aphroquant.models.spec import DecoderSpec

# If nothing else is said: this share of the memory that is left beside the weights, but no more than this many bytes
# unless one sequence of the full length needs more. Blocks of finished requests are kept for reuse, so that in time all
# of it is used.
KV_SHARE = 0.5
KV_BYTES = 4 * 2**30
_CGROUP = Path("/sys/fs/cgroup")


def context_limit(spec: DecoderSpec) -> int:
    """Positions that the model was made for, with its rope scaling."""
    scaled = spec.rope.parameters.get("factor", 1) * spec.rope.parameters.get("original_max_position_embeddings", 0)
    return max(spec.max_position_embeddings, int(scaled) if spec.rope.kind != "default" else 0)


def plan_kv_blocks(
    config: EngineConfig, spec: DecoderSpec, scheme: KVScheme, weight_bytes: int, *, room: int | None = None
) -> tuple[int, int]:
    """(number of KV blocks, max_model_len). `weight_bytes` is the memory that the weights are still going to take.

    `room`: bytes that the cache may take, on a GPU; without it a share of the machine's memory.

    Raises ResourceError if not even one sequence of the wanted length fits.
    """
    limit = context_limit(spec)
    if config.max_model_len is not None and not 2 <= config.max_model_len <= limit:
        raise UsageError(f"max_model_len = {config.max_model_len} must be between 2 and the model's limit of {limit}")
    wanted = config.max_model_len or limit
    num_blocks = _num_blocks(config, scheme.bytes_per_block(spec, config.block_size), wanted, weight_bytes, room)
    capacity = num_blocks * config.block_size
    if capacity < (config.max_model_len or 2):
        raise ResourceError(
            f"the KV cache has room for {max(capacity, 0)} tokens, but one sequence needs {config.max_model_len or 2}",
            hint="free memory, lower max_model_len, choose a smaller kv_cache_dtype, or raise kv_cache_memory",
        )
    return num_blocks, min(wanted, capacity)


def _num_blocks(config: EngineConfig, block_bytes: int, max_model_len: int, weight_bytes: int, room: int | None) -> int:
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory // block_bytes
    one_sequence = -(-max_model_len // config.block_size)
    if room is not None:
        return min(room // block_bytes, config.max_num_seqs * one_sequence)
    affordable = int(KV_SHARE * (available_memory() - weight_bytes)) // block_bytes
    useful = min(config.max_num_seqs * one_sequence, max(KV_BYTES // block_bytes, one_sequence))
    return min(affordable, useful)


def available_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group if that has a limit."""
    machine, cgroup = _machine_available(Path("/proc/meminfo")), _cgroup_available(_CGROUP)
    return machine if cgroup is None else min(machine, cgroup)


def _machine_available(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available(root: Path) -> int | None:
    """Limit less use, where pages of files that can be dropped do not count as used. Version 2, then version 1."""
    for limit, usage, inactive, folder in (
        ("memory.max", "memory.current", "inactive_file", root),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", root / "memory"),
    ):
        if (folder / limit).exists():
            allowed = (folder / limit).read_text().strip()
            if allowed == "max":
                return None
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return int(allowed) - int((folder / usage).read_text()) + int(stat.get(inactive, 0))
    return None
