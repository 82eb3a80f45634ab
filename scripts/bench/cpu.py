"""Prompt and decode speed of aphroquant, transformers and llama.cpp with the sample model, measured in turns.

Every contestant is a process of its own (contestants.py) that has loaded its model before the first measurement. They
take turns, so that a disturbance of the machine falls on all of them; the median of the repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from fetch_sample import cache_dir, sample_model  # noqa: E402  # a script beside this folder

LLAMA_CPP = "llama-cpp-python==0.3.36"
GROUP_SIZE = 64
CONTESTANTS = ("aphroquant", "aphroquant forward", "transformers float32", "transformers bfloat16", "llama.cpp")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Path | None
    prompt_tokens: int
    decode_tokens: int
    repetitions: int
    threads: int
    without: list[str]


class Contestant:
    """One process that measures whenever it is asked to."""

    def __init__(self, name: str, python: str, model: Path, options: Options) -> None:
        self.name = name
        self.prompt: list[float] = []
        self.decode: list[float] = []
        sizes = (options.prompt_tokens, options.decode_tokens, options.threads)
        command = [python, str(HERE / "contestants.py"), name, str(model), *map(str, sizes)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()

    def measure(self) -> None:
        """One prompt and its continuation; seconds become tokens a second."""
        assert self._process.stdin is not None
        print("measure", file=self._process.stdin, flush=True)
        result = self._answer()
        self.prompt.append(result["prompt"])
        self.decode.append(result["decode"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the process of {self.name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    options = parse()
    sample = sample_model()
    quantized = options.model or quantize(sample)
    models = {name: quantized if name.startswith("aphroquant") else sample for name in CONTESTANTS}
    contestants = []
    for name in CONTESTANTS:
        if name in options.without:
            continue
        say(f"loading {name}")
        python = llama_python() if name == "llama.cpp" else sys.executable
        contestants.append(Contestant(name, python, models[name], options))
    for repetition in range(options.repetitions):
        say(f"repetition {repetition + 1} of {options.repetitions}")
        for contestant in contestants:
            contestant.measure()
    for contestant in contestants:
        contestant.close()
    report(contestants, options, quantized)


def parse() -> Options:
    parser = argparse.ArgumentParser(prog="bench_cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a 4-bit checkpoint (default: the sample model as AWQ, group 64)")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without", action="append", default=[], choices=CONTESTANTS, help="leave one out; repeatable")
    return Options(**vars(parser.parse_args()))


def quantize(sample: Path) -> Path:
    """The sample model as 4-bit AWQ, rounded to nearest: speed does not depend on the solver."""
    from aphroquant.conversion import convert

    out = ROOT / "build" / "bench" / f"SmolLM2-135M-Instruct-AWQ-g{GROUP_SIZE}"
    if not (out / "config.json").exists():
        say(f"quantizing to {out}")
        setting = {"bits": 4, "group_size": GROUP_SIZE, "symmetric": False, "solver": "rtn", "samples": 0}
        convert(sample, to="awq", out=out, requantize=True, **setting)
    return out


def llama_python() -> str:
    """The interpreter of an environment with llama-cpp-python, compiled for this machine on first use."""
    folder = cache_dir().parent / "venvs" / LLAMA_CPP.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"installing {LLAMA_CPP} (compiles llama.cpp: several minutes)")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", LLAMA_CPP], check=True)
        (folder / "ready").touch()
    return str(python)


def report(contestants: list[Contestant], options: Options, quantized: Path) -> None:
    versions: dict[str, str] = {}
    rows: dict[str, Mapping[str, float]] = {}
    for contestant in contestants:
        versions |= contestant.versions
        rows[contestant.name] = {
            "prompt_tokens_per_second": round(statistics.median(contestant.prompt), 1),
            "decode_tokens_per_second": round(statistics.median(contestant.decode), 1),
        }
    sizes = f"{options.prompt_tokens} prompt and {options.decode_tokens} decoded tokens, {options.threads} threads"
    print(f"{cpu_name()}: {sizes}, median of {options.repetitions} (lowest - highest)\n")
    print(f"{'tokens/s':24}{'prompt':>26}{'decode':>26}")
    for contestant in contestants:
        print(f"{contestant.name:24}{spread(contestant.prompt):>26}{spread(contestant.decode):>26}")
    print()
    settings = {name: value for name, value in vars(options).items() if name not in ("model", "without")}
    print(json.dumps({"cpu": cpu_name(), "model": quantized.name, **settings, "results": rows, "versions": versions}))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
