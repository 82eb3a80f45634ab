"""Hold a plan against what then happens: size, memory and time of one conversion, on this machine.

    .venv/bin/python scripts/compare_plan.py SOURCE --to gptq [--layers 8] [--samples 64] ...

All but --layers, which takes the first blocks of SOURCE only, are options of `aphroquant convert`. The last line is
JSON. The conversion runs in a process of its own, as the plan's trials do. A machine that is busy with something else
makes both of them slower, but hardly alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from aphroquant.checkpoint import open_checkpoint
from aphroquant.planning.excerpt import write_excerpt

LIMITS = {"bytes": 0.01, "peak_bytes": 0.15, "seconds": 0.30, "cpu_seconds": 0.30}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--layers", type=int)
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.source
        if arguments.layers is not None:
            source = Path(folder) / "source"
            write_excerpt(open_checkpoint(arguments.source), arguments.layers, source)
        plan = _aphroquant("plan", str(source), *options)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        made = _aphroquant("convert", str(source), *options, "--out", f"{folder}/out")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        written = sum(path.stat().st_size for path in Path(folder, "out").rglob("*") if path.is_file())
    rows = {
        "bytes": (plan["outputs"][0]["file_bytes"], written),
        "peak_bytes": (plan["estimate"]["peak_bytes"], made["peak_memory_bytes"]),
        "seconds": (plan["estimate"]["seconds"], made["seconds"]),
        "cpu_seconds": (
            plan["estimate"]["cpu_seconds"],
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        ),
    }
    for name, (planned, real) in rows.items():
        print(f"{name:<11} planned {planned:>14,.1f}  was {real:>14,.1f}  {planned / real - 1:+.1%}")
    print(json.dumps({"rows": rows, "trials": plan["estimate"]["trials"], "options": options}))
    return int(any(abs(planned / real - 1) > LIMITS[name] for name, (planned, real) in rows.items()))


def _aphroquant(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", "aphroquant", *words, "--json", "-"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
