"""Hold a plan against what then happens: size, memory and time of one conversion, on this machine.

    .venv/bin/python scripts/compare_plan.py SOURCE gptq [--layers 8] [--set samples=64 --set solver=rtn ...]

--layers takes the first blocks of SOURCE only; --set are arguments of `aphroquant.convert`. The last line is JSON. The
conversion runs in a process of its own, as the plan's trials do. Another program on the machine makes both of them
slower, but hardly alike: processor time is then what can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion.arguments import make_request
from aphroquant.planning.excerpt import write_excerpt
from aphroquant.planning.plan import plan
from aphroquant.planning.trial import try_conversion

LIMITS = {"bytes": 0.01, "peak_bytes": 0.15, "seconds": 0.30, "cpu_seconds": 0.30}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("to")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    settings = {name: _value(text) for name, _, text in (entry.partition("=") for entry in arguments.settings)}
    with tempfile.TemporaryDirectory() as folder:
        source, out = arguments.source, Path(folder) / "out"
        if arguments.layers is not None:
            source = Path(folder) / "source"
            write_excerpt(open_checkpoint(arguments.source), arguments.layers, source)
        request = make_request(source, to=arguments.to, out=out / "planned", **settings)
        found = plan([request])
        made = try_conversion([request], source, request.samples, out)
        written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert found.estimate is not None, found.no_estimate
    rows = {
        "bytes": (found.outputs[0].file_bytes, written),
        "peak_bytes": (found.estimate.peak_bytes, made.peak_bytes),
        "seconds": (found.estimate.seconds, made.whole.seconds),
        "cpu_seconds": (found.estimate.cpu_seconds, made.whole.cpu_seconds),
    }
    for name, (planned, real) in rows.items():
        print(f"{name:<11} planned {planned:>14,.1f}  was {real:>14,.1f}  {planned / real - 1:+.1%}")
    print(json.dumps({"rows": rows, "trials": found.estimate.trials, "to": arguments.to, "settings": settings}))
    return int(any(abs(planned / real - 1) > LIMITS[name] for name, (planned, real) in rows.items()))


def _value(text: str) -> object:
    """A number where it is one, else the word."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value


if __name__ == "__main__":
    sys.exit(main())
