"""What other libraries make of the same base: same calibration windows, each library in an environment of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interop_lib.environments import interpreter

WORKERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """`package` names the environment. `bits` are those that it can do; `settings` go into the request."""

    package: str
    worker: str
    bits: tuple[int, ...]
    asymmetric: bool = True
    symmetric: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def can(self, bits: int, symmetric: bool) -> bool:
        return bits in self.bits and (self.symmetric if symmetric else self.asymmetric)


PEERS = {
    "gptqmodel-gptq": Peer("gptqmodel", "gptqmodel_peer.py", (2, 3, 4), settings={"method": "gptq"}),
    "gptqmodel-awq": Peer("gptqmodel", "gptqmodel_peer.py", (4,), symmetric=False, settings={"method": "awq"}),
    "auto-round": Peer("auto-round", "auto_round_peer.py", (2, 3, 4)),
    "hqq": Peer("hqq", "hqq_peer.py", (2, 3, 4), symmetric=False),
    "bitsandbytes-nf4": Peer("development", "bitsandbytes_peer.py", (4,), asymmetric=False),
}


def quantize(name: str, request: Mapping[str, Any], *, here: bool) -> dict[str, Any]:
    """Run one, and tell its seconds and peak memory. With `here`, in the environment that runs this."""
    peer = PEERS[name]
    path = Path(f"{request['out']}.request.json")
    path.write_text(json.dumps({**request, **peer.settings}))
    python = Path(sys.executable) if here else interpreter(peer.package)
    started = time.monotonic()
    process = subprocess.Popen(
        [str(python), str(WORKERS / peer.worker), str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},  # its default fails on machines of few processors
    )
    assert process.stderr is not None
    told = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    path.unlink()
    if status:
        raise PeerError(f"{name} ended with {os.waitstatus_to_exitcode(status)}:\n{told[-3000:]}")
    return {"seconds": time.monotonic() - started, "peak_memory_bytes": _peak(usage)}


class PeerError(Exception):
    """A library failed; the message holds the end of what it said."""


def _peak(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * 1024
