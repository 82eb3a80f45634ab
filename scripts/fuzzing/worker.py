"""One process that probes damaged checkpoints: lines `format seed` come in, lines of JSON go out."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

import torch

from fuzzing.corpus import checkpoint_files
from fuzzing.directories import Entry, write_entries
from fuzzing.mutations import DATA_KINDS, mutate
from fuzzing.probe import Outcome, probe

HEADROOM = 3 * 2**29  # bytes of address space beyond what the imports took


class Worker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound: dict[str, tuple[dict[str, bytes], str]] = {}

    def run(self, name: str, seed: int) -> dict[str, object]:
        files, digest = self._sound_files(name)
        random = Random(f"{name} {seed}")
        entries, done = mutate(files, random)
        outcome = self._probe(name, entries, random, self.folder / "sound" / name / _source_name(name))
        result = outcome.to_dict() | {"name": name, "seed": seed, "kinds": done}
        changed = outcome.ended == "loaded" and outcome.digest != digest
        result["changed"] = changed and not DATA_KINDS & set(done)
        return result

    def keep(self, name: str, seed: int, folder: Path) -> list[str]:
        """Write one case where it can be looked at."""
        entries, done = mutate(self._sound_files(name)[0], Random(f"{name} {seed}"))
        folder.mkdir(parents=True)
        write_entries(entries, folder)
        return done

    def _sound_files(self, name: str) -> tuple[dict[str, bytes], str]:
        if name not in self.sound:
            files = checkpoint_files(name)
            place = self.folder / "sound" / name
            place.mkdir(parents=True)
            write_entries(dict(files), place)
            outcome = self._probe(name, dict(files), Random(0), None)
            assert outcome.ended == "loaded" and not outcome.faults, f"{name} is not sound: {outcome}"
            self.sound[name] = files, outcome.digest
        return self.sound[name]

    def _probe(self, name: str, entries: dict[str, Entry], random: Random, sound: Path | None) -> Outcome:
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            model, output = Path(place) / "model", Path(place) / "out" / "converted"
            model.mkdir()
            output.parent.mkdir()
            write_entries(entries, model)
            return probe(model / _source_name(name), output, random, sound)


def _source_name(name: str) -> str:
    """What of the folder is given to the product: the GGUF file, or the folder itself."""
    return "model.gguf" if name.startswith("gguf") else ""


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.chdir(folder)
        worker = Worker(Path(folder))
        limited = False
        for line in sys.stdin:
            name, seed = line.split()
            worker._sound_files(name)
            if not limited:  # everything is imported now
                _limit_memory()
                limited = True
            print(json.dumps(worker.run(name, int(seed))), file=replies, flush=True)
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
