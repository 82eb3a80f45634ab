"""Damage to a checkpoint's files, by chance from a seed: bytes, headers, configs, tensors, and the directory itself.

Every mutation gives its kind, a short name for the counts. Those in DATA_KINDS may leave a file that is sound and holds
other numbers; after all others a file that is still read should be looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from random import Random

from fuzzing import directories, documents, gguf_headers, safetensors_files, streams
from fuzzing.directories import Entry

Entries = dict[str, Entry]
Mutation = Callable[[Entries, Random], str]

DATA_KINDS = frozenset({"bytes of data", "values of a tensor"})
_MAX_AT_ONCE = 3
_NOTHING_LEFT = (LookupError, ValueError, TypeError, AttributeError, StopIteration, RecursionError, struct.error)

_COMMON: Mapping[Mutation, int] = {
    streams.damage_file: 4,
    documents.damage_config: 8,
    documents.damage_patterns: 1,
    documents.damage_tokenizer: 2,
    directories.damage_directory: 2,
}
_SAFETENSORS: Mapping[Mutation, int] = {
    streams.damage_safetensors_header: 3,
    safetensors_files.damage_entries: 8,
    safetensors_files.damage_tensors: 8,
    documents.damage_index: 1,
}
_GGUF: Mapping[Mutation, int] = {
    streams.damage_gguf_header: 6,
    gguf_headers.damage_fields: 10,
    gguf_headers.damage_entries: 6,
}


def mutate(files: Mapping[str, bytes], random: Random) -> tuple[Entries, list[str]]:
    """The damaged files, and what was done. One to three mutations, mostly one."""
    entries: Entries = dict(files)
    is_gguf = "model.gguf" in files
    weights = {**_COMMON, **(_GGUF if is_gguf else _SAFETENSORS)}
    if is_gguf:
        del weights[documents.damage_config], weights[documents.damage_patterns], weights[documents.damage_tokenizer]
    done: list[str] = []
    for _ in range(random.choices(range(1, _MAX_AT_ONCE + 1), [8, 2, 1])[0]):
        mutation = random.choices(list(weights), list(weights.values()))[0]
        try:
            done.append(mutation(entries, random))
        except _NOTHING_LEFT as error:
            # an earlier mutation left nothing that this one could work on
            done.append(f"nothing ({type(error).__name__})")
    return entries, done
