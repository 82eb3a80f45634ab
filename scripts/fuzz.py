"""Damages tiny checkpoints of every format by chance, and checks that each ends well.

    ./scripts/fuzz --cases 1000 --seed 0              over all formats
    ./scripts/fuzz --cases 200 --formats gptq gguf    those whose name begins so
    ./scripts/fuzz --only exl3 17 --keep DIR          one case, its files written to DIR

A case ends well in numbers, or in one sentence with exit code 2 or 3 that names the file; not in a traceback, a hang,
an allocation far beyond the file's size, control characters on the terminal, or something left in the output's place.
Each case is told by its format and seed, and repeats exactly. Progress and faults go to stderr; counts for each format
to stdout, whose last line is JSON. The exit code is 4 if a case ended badly.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

EXIT_FAULTS = 4
MAX_SECONDS = 60.0  # of one case, before its process is killed; on a busy machine


class WorkerProcess:
    """A worker in a process of its own, begun anew when one has been killed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, name: str, seed: int) -> dict[str, Any]:
        if self.process is None:
            self.process = self._start()
            self._reply_to(name, -1, 10 * self.seconds)  # imports everything, and makes the sound files
        return self._reply_to(name, seed, self.seconds)

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
        command = [sys.executable, "-m", "fuzzing.worker"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def _reply_to(self, name: str, seed: int, seconds: float) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {seed}\n".encode())
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        fault = "the process died" if ready else f"no end within {seconds:.0f} s"
        self.process.kill()
        self.process.wait()
        self.process = None
        return {"name": name, "seed": seed, "ended": "crashed", "kinds": [], "codes": {}, "faults": [fault],
                "changed": False, "message": ""}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="how many, over all formats; default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each format; default: 0")
    parser.add_argument("--formats", nargs="+", default=[""], metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--only", nargs=2, metavar=("FORMAT", "SEED"), help="one case")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --only: write its files here, and stop")
    parser.add_argument("--log", type=Path, metavar="FILE", help="write a line of JSON for every case")
    options = parser.parse_args()

    from fuzzing.corpus import names

    if options.keep:
        from fuzzing.worker import Worker

        name, seed = options.only
        with tempfile.TemporaryDirectory() as folder:
            print(Worker(Path(folder)).keep(name, int(seed), options.keep), file=sys.stderr)
        return 0
    chosen = [name for name in names() if name.startswith(tuple(options.formats))]
    if options.only:
        cases = [(options.only[0], int(options.only[1]))]
    else:
        cases = [(chosen[i % len(chosen)], options.seed + i // len(chosen)) for i in range(options.cases)]
    print(f"{len(cases)} cases over {len(chosen)} formats, seeds from {options.seed}", file=sys.stderr)
    return _report(_run(cases, options.log))


def _run(cases: list[tuple[str, int]], log: Path | None) -> list[dict[str, Any]]:
    worker, results, began = WorkerProcess(MAX_SECONDS), [], time.monotonic()
    for number, (name, seed) in enumerate(cases, 1):
        result = worker.ask(name, seed)
        results.append(result)
        for fault in result["faults"]:
            print(f"FAULT {name} {seed} {result['kinds']}: {fault}", file=sys.stderr, flush=True)
        if log:
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
        if number % 500 == 0:
            seconds = time.monotonic() - began
            print(f"{number}/{len(cases)}  {seconds:.0f} s", file=sys.stderr, flush=True)
    worker.close()
    return results


def _report(results: list[dict[str, Any]]) -> int:
    counts: dict[str, Counter[str]] = {}
    for result in results:
        count = counts.setdefault(result["name"], Counter())
        count["cases"] += 1
        count[result["ended"]] += 1
        count["faults"] += bool(result["faults"])
        for command, code in result["codes"].items():
            count[f"{command} {code}"] += 1
    columns = ["cases", "loaded", "refused", "faults", "inspect 0", "inspect 3", "convert 0", "convert 2", "convert 3"]
    width = max(map(len, counts))
    print("  ".join([" " * width, *columns]))
    for name, count in counts.items():
        merged = Counter(count)
        for code in (0, 2, 3):
            merged[f"convert {code}"] += count[f"convert --dry-run {code}"] if code else 0
        cells = [str(merged[column]).rjust(len(column)) for column in columns]
        print("  ".join([name.ljust(width), *cells]))
    total = sum(counts.values(), Counter())
    bad = [f"{result['name']} {result['seed']}" for result in results if result["faults"]]
    print(json.dumps({"total": dict(total), "formats": {k: dict(v) for k, v in counts.items()}, "bad": bad[:100]}))
    return EXIT_FAULTS if bad else 0


if __name__ == "__main__":
    sys.exit(main())
