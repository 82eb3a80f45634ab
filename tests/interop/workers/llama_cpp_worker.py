"""Runs in an environment with xllamacpp or llama-cpp-python: what llama.cpp makes of a GGUF file. Prints JSON.

    python llama_cpp_worker.py REQUEST.json LOGITS.npy

The request: `model` (path), `texts` (to tokenize with special tokens parsed), `prompt` (token ids), `num_tokens`. The
answer: `tokens` of each text, `greedy` continuation of the prompt; the logits after each token of the prompt, float32
[len(prompt), V], go into the .npy file.

Their wheels have llama.cpp built for any CPU, with llama.h's functions exported. Structs are passed by value in more
space than they have, which x86-64 and AArch64 callees do not notice: only leading fields are known here.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 256


class ModelParams(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_byte * 1024)]


class ContextParams(ctypes.Structure):
    _fields_ = [("n_ctx", c_uint32), ("opaque", ctypes.c_byte * 1020)]


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", c_int32), ("opaque", ctypes.c_byte * 252)]


def main(request_path: str, logits_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    llama = load_library()
    model = llama.llama_model_load_from_file(request["model"].encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not load the file")
    vocab = llama.llama_model_get_vocab(model)
    params = llama.llama_context_default_params()
    params.n_ctx = CONTEXT
    context = llama.llama_init_from_model(model, params)
    llama.llama_set_n_threads(context, 1, 1)  # more than there are cores would wait for each other, spinning
    num_rows = llama.llama_vocab_n_tokens(vocab)
    rows = [step(llama, context, token, num_rows) for token in request["prompt"]]
    greedy: list[int] = []
    while len(greedy) < request["num_tokens"]:
        row = rows[-1] if not greedy else step(llama, context, greedy[-1], num_rows)
        greedy.append(int(row.argmax()))
    np.save(logits_path, np.stack(rows))
    tokens = [tokenize(llama, vocab, text) for text in request["texts"]]
    print(json.dumps({"tokens": tokens, "greedy": greedy}), flush=True)


def load_library() -> Any:
    llama = ctypes.CDLL(str(library_path()))
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
        "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
        "llama_decode": (c_int32, [c_void_p, Batch]),
        "llama_get_logits": (POINTER(c_float), [c_void_p]),
        "llama_tokenize": (
            c_int32,
            [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    return llama


def library_path() -> Path:
    """The shared library of the package that is installed."""
    for package, name in (("xllamacpp", ".so"), ("llama_cpp_python", "libllama.so")):
        try:
            found = [entry for entry in files(package) or [] if entry.name.endswith(name)]
        except PackageNotFoundError:
            continue
        return Path(str(found[0].locate()))
    raise SystemExit("neither xllamacpp nor llama-cpp-python is installed")


def step(llama: Any, context: Any, token: int, num_rows: int) -> np.ndarray:
    """The logits after one more token."""
    tokens = (c_int32 * 1)(token)
    if llama.llama_decode(context, llama.llama_batch_get_one(tokens, 1)):
        raise SystemExit("llama_decode failed")
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (num_rows,)).copy()


def tokenize(llama: Any, vocab: Any, text: str) -> list[int]:
    data = text.encode()
    found = (c_int32 * (len(data) + 8))()
    count = llama.llama_tokenize(vocab, data, len(data), found, len(found), True, True)
    return list(found[:count])


if __name__ == "__main__":
    main(*sys.argv[1:])
