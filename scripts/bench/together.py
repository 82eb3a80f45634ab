"""Time of four outputs from one pass (AWQ, GPTQ, static FP8, GGUF Q4_K_M) against four conversions.

    python scripts/bench/together.py SOURCE [--samples 32] [--seq-len 512] [--text FILE]

Each runs in a process of its own; processor seconds count, which other work on the machine changes little. The files
of both ways must be the same bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

OUTPUTS = {
    "awq": ["--to", "awq"],
    "gptq": ["--to", "gptq"],
    "fp8": ["--to", "fp8", "--scheme", "fp8-static"],
    "q4_k_m.gguf": ["--to", "gguf", "--scheme", "q4_k_m"],
}
# The conversion of a pipeline without its other steps.
TOGETHER = """
import sys
from pathlib import Path
from aphroquant.conversion.run import convert_all
from aphroquant.recipes.loading import read_recipe
from aphroquant.recipes.requests import requests_of
recipe = read_recipe(sys.argv[1]).recipe
places = {name: Path(output.out) for name, output in recipe.outputs.items()}
convert_all(list(requests_of(recipe, places, None).values()))
"""
KEYS = {"--to": "to", "--scheme": "scheme"}


class Cost(NamedTuple):
    """Of one process."""

    seconds: float
    processor_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--samples", default=32, type=int)
    parser.add_argument("--seq-len", default=512, type=int)
    parser.add_argument("--text", default="default")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "alone", Path(folder) / "together"
        alone.mkdir()
        together.mkdir()
        text = ["--calibration", chosen.text, "--samples", str(chosen.samples), "--seq-len", str(chosen.seq_len)]
        costs = {}
        for name, flags in OUTPUTS.items():
            words = ["convert", str(chosen.source), "--out", str(alone / name), *flags, *text]
            costs[name] = run(["-m", "aphroquant", *words])
            print(f"{name:<12} {told(costs[name])}", flush=True)
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(json.dumps(recipe_of(chosen, together)))
        costs["together"] = run(["-c", TOGETHER, str(recipe)])
        print(f"{'together':<12} {told(costs['together'])}")
        check_same(alone, together)
    separate = [sum(part) for part in zip(*(costs[name] for name in OUTPUTS), strict=True)]
    print(f"{'separate':<12} {told(Cost(*separate))}")
    print(json.dumps({"costs": {name: cost._asdict() for name, cost in costs.items()}, "samples": chosen.samples}))


def run(words: list[str]) -> Cost:
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.monotonic() - begun, used)


def recipe_of(chosen: argparse.Namespace, place: Path) -> dict[str, object]:
    outputs = {}
    for name, flags in OUTPUTS.items():
        settings = {KEYS[flag]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        outputs[name.removesuffix(".gguf")] = {**settings, "out": str(place / name)}
    calibration = {"sources": [{"path": chosen.text}], "samples": chosen.samples, "seq_len": chosen.seq_len}
    source = str(chosen.source.absolute())
    return {"source": source, "calibration": calibration, "outputs": outputs, "evaluation": None}


def check_same(alone: Path, together: Path) -> None:
    for name in OUTPUTS:
        weights = "" if name.endswith(".gguf") else "model.safetensors"
        first, second = (hashlib.sha256((folder / name / weights).read_bytes()) for folder in (alone, together))
        if first.digest() != second.digest():
            raise SystemExit(f"{name}: the two ways wrote other bytes")


def told(cost: Cost) -> str:
    return f"{cost.processor_seconds:8.1f} processor seconds, {cost.seconds:8.1f} s"


if __name__ == "__main__":
    main()
