"""Peak memory and throughput of conversions that do not fit into memory, beside cp of the same files in the same run.

The source is a Llama of the shapes of a 70B model (smaller ones for small sizes) with as many layers as make the bytes
asked for. Its numbers are random, cut from one pool, and really written: sparse files would flatter both sides. Before
each measurement the files leave the page cache as far as the kernel lets them; what is written is on the disk (fsync,
sync) when the clock stops. One copy goes ahead unmeasured: a virtual machine gets memory from its host when it is first
touched, and whoever writes first would pay for it. Memory is the kernel's own high-water mark (VmHWM, which counts
mapped files), and the largest anonymous part of it that was sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter
from aphroquant.models.spec import LM_HEAD, DecoderSpec, decoder_spec

GIGABYTE = 10**9
POOL_BYTES = 2**26
GROUP = 128
ZERO_WORD = 0x77777777  # GPTQ v1, symmetric, 4 bits


@dataclass(frozen=True)
class Case:
    """A conversion: what the source holds, and the command's options."""

    source: str
    options: tuple[str, ...]


CASES = {
    "gptq-awq": Case("gptq", ("--to", "awq")),
    "fp8-ct": Case("fp8", ("--to", "compressed-tensors")),
    "rtn-w4": Case("dense", ("--to", "compressed-tensors", "--bits", "4", "--samples", "0")),
    "rtn-fp8": Case("dense", ("--to", "fp8", "--samples", "0")),
    "gptq-ct": Case("gptq", ("--to", "compressed-tensors")),
}
BITS_PER_WEIGHT = {"gptq": 4.13, "fp8": 8.0, "dense": 16.0}
QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
    "dense": None,
}


@dataclass(frozen=True)
class Measurement:
    """One conversion beside cp. Throughputs are of the source's bytes."""

    case: str
    source_bytes: int
    output_bytes: int
    seconds: float
    mb_per_second: float
    cpu_seconds: float
    cpu_seconds_per_gb: float
    cp_seconds: float
    cp_mb_per_second: float
    cp_cpu_seconds: float
    peak_rss_mb: float
    peak_anonymous_mb: float


def main() -> None:
    arguments = _arguments()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    _check_room(arguments.directory, arguments.gigabytes)
    measured = []
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="streaming-") as folder:
        for name in arguments.cases:
            measured.append(measure(name, Path(folder), arguments.gigabytes))
            _print(measured[-1])
    print(json.dumps({"measurements": [asdict(each) for each in measured], "max_rss_mb": arguments.max_rss_mb}))
    if any(each.peak_rss_mb > arguments.max_rss_mb for each in measured):
        sys.exit(f"error: the peak memory is above {arguments.max_rss_mb} MB")


def measure(name: str, folder: Path, gigabytes: float) -> Measurement:
    """Make the source, convert it, copy it, and remove everything."""
    case = CASES[name]
    source, out = folder / "source", folder / "out"
    write_checkpoint(source, case.source, int(gigabytes * GIGABYTE))
    try:
        command = [sys.executable, "-m", "aphroquant", "convert", str(source), *case.options, "--out", str(out)]
        _copy(source, out)
        shutil.rmtree(out)
        forget(source)
        used = _cpu_seconds()
        seconds, peak, anonymous = watched(command)
        cpu_seconds = _cpu_seconds() - used
        output_bytes = _size(out)
        shutil.rmtree(out)
        forget(source)
        begun, used = time.monotonic(), _cpu_seconds()
        _copy(source, out)
        copying, cp_cpu_seconds = time.monotonic() - begun, _cpu_seconds() - used
        source_bytes = _size(source)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    return Measurement(
        case=name,
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        seconds=round(seconds, 2),
        mb_per_second=round(source_bytes / seconds / 1e6, 1),
        cpu_seconds=round(cpu_seconds, 2),
        cpu_seconds_per_gb=round(cpu_seconds / source_bytes * GIGABYTE, 2),
        cp_seconds=round(copying, 2),
        cp_mb_per_second=round(source_bytes / copying / 1e6, 1),
        cp_cpu_seconds=round(cp_cpu_seconds, 2),
        peak_rss_mb=round(peak / 1e6, 1),
        peak_anonymous_mb=round(anonymous / 1e6, 1),
    )


def _copy(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.iterdir():
        _synced(path)


def write_checkpoint(directory: Path, kind: str, num_bytes: int) -> None:
    """A checkpoint of about that many bytes: "dense" in bfloat16, "gptq" of 4 bits, or "fp8" per tensor."""
    config = _config(kind, num_bytes)
    spec = decoder_spec(config)
    pools = _Pools()
    with CheckpointWriter(directory) as writer:
        for name in ("model.embed_tokens.weight", f"{LM_HEAD}.weight"):
            shape = (spec.vocab_size, spec.hidden_size)
            writer.add_pieces(name, torch.bfloat16, shape, pools.pieces(torch.bfloat16, shape))
        writer.add("model.norm.weight", torch.ones(spec.hidden_size, dtype=torch.bfloat16))
        for layer in range(spec.num_layers):
            prefix = spec.block_prefix(layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}.{norm}.weight", torch.ones(spec.hidden_size, dtype=torch.bfloat16))
        for module in spec.modules():
            _add_module(writer, pools, kind, module, spec)
        quantization = QUANTIZATION[kind]
        writer.finish(config if quantization is None else config | {"quantization_config": quantization})


def _add_module(writer: CheckpointWriter, pools: _Pools, kind: str, module: str, spec: DecoderSpec) -> None:
    rows, columns = spec.linear_shape(module.split(".", 3)[3])
    if kind == "gptq":
        writer.add_pieces(
            f"{module}.qweight", torch.int32, (columns // 8, rows), pools.pieces(torch.int32, (columns // 8, rows))
        )
        groups = columns // GROUP
        writer.add(f"{module}.qzeros", torch.full((groups, rows // 8), ZERO_WORD, dtype=torch.int32))
        writer.add(f"{module}.scales", torch.rand(groups, rows).add_(0.5).mul_(0.01).half())
        writer.add(f"{module}.g_idx", torch.arange(columns, dtype=torch.int32) // GROUP)
        return
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.bfloat16
    writer.add_pieces(f"{module}.weight", dtype, (rows, columns), pools.pieces(dtype, (rows, columns)))
    if kind == "fp8":
        writer.add(f"{module}.weight_scale", torch.tensor(2e-4))


class _Pools:
    """Random numbers of each dtype, enough to cut tensors from that differ."""

    def __init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._pools: dict[torch.dtype, Tensor] = {}
        self._offset = 0

    def pieces(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """As many elements as the shape has, each tensor from another offset of the pool on."""
        if dtype not in self._pools:
            self._pools[dtype] = self._made(dtype)
        pool = self._pools[dtype]
        left = torch.Size(shape).numel()
        self._offset = (self._offset + 999_983) % (pool.numel() // 2)
        offset = self._offset
        while left:
            piece = pool[offset : offset + left]
            yield piece
            left -= piece.numel()
            offset = 0

    def _made(self, dtype: torch.dtype) -> Tensor:
        count = POOL_BYTES // dtype.itemsize
        if dtype == torch.int32:
            return torch.randint(-(2**31), 2**31, (count,), generator=self._random, dtype=torch.int64).to(dtype)
        return (torch.randn(count, generator=self._random) * (100 if dtype.itemsize == 1 else 0.02)).to(dtype)


def _config(kind: str, num_bytes: int) -> dict[str, Any]:
    large = num_bytes >= 6 * GIGABYTE
    hidden, wide, heads, vocab = (8192, 28672, 64, 128256) if large else (2048, 8192, 16, 32000)
    kv_heads = 8
    per_layer = hidden * hidden * 2 + 2 * hidden * (kv_heads * hidden // heads) + 3 * hidden * wide
    ends = 2 * 2 * vocab * hidden
    layers = max(1, round((num_bytes - ends) / (per_layer * BITS_PER_WEIGHT[kind] / 8)))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def watched(command: list[str]) -> tuple[float, int, int]:
    """Run it: seconds, peak resident bytes, peak anonymous bytes. Ends the program if it fails."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watching = threading.Thread(target=_watch, args=(process, peaks))
    watching.start()
    output, _ = process.communicate()
    seconds = time.monotonic() - begun
    watching.join()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}:\n{output}")
    return seconds, peaks["VmHWM"], peaks["RssAnon"]


def _watch(process: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.02)


def forget(directory: Path) -> None:
    """Ask the kernel to drop the directory's files from the page cache, so that the disk is read."""
    for path in directory.iterdir():
        _synced(path)
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _synced(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _cpu_seconds() -> float:
    """Of all children that have ended: on a busy machine it tells more than the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _check_room(directory: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(directory).free
    if free < 2.1 * gigabytes * GIGABYTE:
        sys.exit(f"error: {directory} has {free / GIGABYTE:.1f} GB free, and twice {gigabytes} GB are needed")


def _print(found: Measurement) -> None:
    print(
        f"{found.case:9} {found.source_bytes / GIGABYTE:6.2f} GB -> {found.output_bytes / GIGABYTE:6.2f} GB  "
        f"{found.seconds:7.1f} s  {found.mb_per_second:7.1f} MB/s  CPU {found.cpu_seconds_per_gb:5.2f} s/GB  "
        f"cp {found.cp_mb_per_second:7.1f} MB/s, CPU {found.cp_cpu_seconds / found.source_bytes * GIGABYTE:5.2f} s/GB  "
        f"peak {found.peak_rss_mb:6.0f} MB, anonymous {found.peak_anonymous_mb:6.0f} MB",
        flush=True,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=20.0, help="size of each source")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--max-rss-mb", type=float, default=2000.0, help="fail above this peak memory")
    return parser.parse_args()


if __name__ == "__main__":
    main()
