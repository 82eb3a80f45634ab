"""What other libraries make of the same base: same calibration windows, each library in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from interop_lib.environments import interpreter

WORKERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """`package` names the environment. `bits` are those that it can do; `settings` go into the request.

    A library with a format of its own, which asks neither for groups nor for zero points, is a row of plain widths.
    `source` is a worker of ours that makes what the library cannot make by itself.
    """

    package: str
    worker: str
    bits: tuple[int, ...]
    symmetric: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None

    def can(self, bits: int, symmetric: bool) -> bool:
        return bits in self.bits and (self.symmetric or not symmetric)


def _llama_cpp(bits: int, kind: str) -> Peer:
    return Peer("llama-cpp-python", "llama_cpp_peer.py", (bits,), settings={"type": kind}, source="importance.py")


PEERS = {
    "gptqmodel-gptq": Peer("gptqmodel", "gptqmodel_peer.py", (2, 3, 4), symmetric=True, settings={"method": "gptq"}),
    "gptqmodel-awq": Peer("gptqmodel", "gptqmodel_peer.py", (4,), settings={"method": "awq"}),
    "auto-round": Peer("auto-round", "auto_round_peer.py", (2, 3, 4), symmetric=True),
    "hqq": Peer("hqq", "hqq_peer.py", (2, 3, 4)),
    "bitsandbytes-nf4": Peer("development", "bitsandbytes_peer.py", (4,)),
    "llama.cpp-q4_0": _llama_cpp(4, "Q4_0"),
    "llama.cpp-q4_k": _llama_cpp(4, "Q4_K_M"),
    "llama.cpp-q3_k": _llama_cpp(3, "Q3_K_M"),
    "llama.cpp-q2_k": _llama_cpp(2, "Q2_K"),
    "aqlm-style-2x8": Peer("development", "aqlm_peer.py", (2,)),
}


class Spent(NamedTuple):
    """Wall-clock and processor seconds of a process, and the most memory that it had resident."""

    seconds: float
    processor_seconds: float
    memory_bytes: int

    def and_then(self, other: Spent) -> Spent:
        return Spent(
            self.seconds + other.seconds,
            self.processor_seconds + other.processor_seconds,
            max(self.memory_bytes, other.memory_bytes),
        )


class Quantized(NamedTuple):
    """`told` by the worker: `versions`, and `gpu_memory_bytes` where there is a GPU."""

    spent: Spent
    told: Mapping[str, Any]


class PeerError(Exception):
    """A process failed; the message holds the end of what it said."""


def quantize(name: str, request: Mapping[str, Any], *, here: bool) -> Quantized:
    """Run one. With `here`, in the environment that runs this."""
    peer = PEERS[name]
    python = Path(sys.executable) if here else interpreter(peer.package)
    shutil.rmtree(request["out"], ignore_errors=True)  # what a run left that was cut off
    path, answer = Path(f"{request['out']}.request.json"), Path(f"{request['out']}.answer.json")
    path.write_text(json.dumps({**request, **peer.settings, "answer": str(answer)}))
    before = _source(peer.source, path, Path(request["base"])) if peer.source else Spent(0.0, 0.0, 0)
    spent = watched([str(python), str(WORKERS / peer.worker), str(path)], folder=path.parent)
    path.unlink()
    return Quantized(before.and_then(spent), json.loads(answer.read_text()))


def _source(worker: str, request: Path, base: Path) -> Spent:
    """Make the dense GGUF file and the importance matrix beside the base, once for all rows; each counts the cost."""
    record = base.with_name("llama.cpp.json")
    windows = sha256(str(json.loads(request.read_text())["token_ids"]).encode()).hexdigest()
    known = json.loads(record.read_text()) if record.exists() else {}
    if known.get("windows") == windows:
        return Spent(*known["spent"])
    options = ["--scheme", "f32", "--samples", "0", "--no-job", "--overwrite"]
    convert = ["convert", str(base), "--to", "gguf", *options, "--out", str(base.with_name("base.gguf"))]
    file = watched([sys.executable, "-m", "aphroquant", *convert])
    spent = file.and_then(watched([sys.executable, str(WORKERS / worker), str(request)]))
    record.write_text(json.dumps({"windows": windows, "spent": spent}))
    return spent


def watched(command: Sequence[str], folder: Path | None = None) -> Spent:
    """Run it to its end, in the folder, where libraries may leave logs. PeerError if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},  # its default fails on machines of few processors
    )
    assert process.stderr is not None
    told = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise PeerError(f"{' '.join(command)} ended with {process.returncode}:\n{told[-3000:]}")
    return Spent(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
