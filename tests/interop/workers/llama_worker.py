"""llama.cpp loads a GGUF file, or quantizes one; through the shared library of xllamacpp or llama-cpp-python.

`settings`: `ftype`, a value of llama.cpp's enum llama_ftype. `source` is then a GGUF file too.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp_worker as binding
import numpy as np
from safetensors.numpy import save_file


class QuantizeParams(ctypes.Structure):
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("opaque", ctypes.c_byte * 1016)]


def main(*paths: str) -> None:
    library = binding.load_library()
    for request_path in paths:
        request = json.loads(Path(request_path).read_text())
        path = Path(request["checkpoint"])
        if request["task"] == "save":
            path.mkdir(parents=True)
            path = path / "model.gguf"
            quantize(library, request["source"], path, request["settings"]["ftype"])
        save_file({"logits": logits(library, path, request["token_ids"])}, request["output"])
        Path(request["output"]).with_suffix(".answer").write_text("{}")


def quantize(library: Any, source: str, target: Path, ftype: int) -> None:
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_model_quantize_default_params.argtypes = []
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, ftype
    if library.llama_model_quantize(source.encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit("llama_model_quantize failed")


def logits(library: Any, path: Path, token_ids: list[list[int]]) -> np.ndarray:
    """[B, S, V], each row in a context of its own."""
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp does not load the file")
    num_rows = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    found = []
    for row in token_ids:
        params = library.llama_context_default_params()
        params.n_ctx = binding.CONTEXT
        context = library.llama_init_from_model(model, params)
        found.append([binding.step(library, context, token, num_rows) for token in row])
    return np.array(found, dtype=np.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
