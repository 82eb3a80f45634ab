"""One conversion of an excerpt in a process of its own, whose memory is then that of the conversion alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aphroquant.conversion.manifest import request_arguments
from aphroquant.conversion.request import ConversionRequest
from aphroquant.errors import AphroquantError, InputError


class Trial(NamedTuple):
    """What one conversion took; `gpu_bytes` is 0 where no GPU was used."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    gpu_bytes: int


def try_conversion(requests: Sequence[ConversionRequest], source: Path, samples: int, out: Path) -> Trial:
    """Convert `source` as these ask, on so many windows and without training.

    InputError with what the conversion says if it fails.
    """
    told = [request_arguments(_smaller(request, source, samples)) for request in requests]
    content = json.dumps({"requests": told, "out": str(out), "threads": torch.get_num_threads()})
    command = [sys.executable, "-m", "aphroquant.planning.trial"]
    done = subprocess.run(command, input=content, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError(f"a trial on a part of {source.name} failed: {lines[-1] if lines else done.returncode}")
    return Trial(*json.loads(done.stdout.splitlines()[-1]))


def _smaller(request: ConversionRequest, source: Path, samples: int) -> ConversionRequest:
    """Rules for single layers are left out: they would decide for all of the excerpt's. So is a size of the whole."""
    rules = tuple(rule for rule in request.rules if "layers" not in rule.match)
    ignore = tuple(pattern for pattern in request.ignore if "layers" not in pattern)
    fewer = min(samples, request.samples)
    request = replace(request, source=str(source), samples=fewer, rules=rules, ignore=ignore)
    return replace(request, refine_steps=0, distill_steps=0, size=None)


def _run(content: dict[str, Any]) -> Trial:
    from pydantic import TypeAdapter

    from aphroquant.conversion.conversion import peak_memory
    from aphroquant.conversion.run import convert_all

    torch.set_num_threads(content["threads"])
    adapter, out = TypeAdapter(ConversionRequest), Path(content["out"])
    suffixes = [".gguf" if told["to"] == "gguf" else "" for told in content["requests"]]
    requests = [
        adapter.validate_python({**told, "out": out / f"{number}{suffix}"})
        for number, (told, suffix) in enumerate(zip(content["requests"], suffixes, strict=True))
    ]
    begun = time.process_time()
    results = convert_all(requests)
    cpu_seconds = time.process_time() - begun
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Trial(max(result.seconds for result in results), cpu_seconds, peak_memory(), on_gpu)


def main() -> int:
    """From a request on standard input to a line of figures on standard output."""
    try:
        print(json.dumps(_run(json.load(sys.stdin))))
    except AphroquantError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
