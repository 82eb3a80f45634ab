"""llama.cpp's own quantizer, with an importance matrix, by the function that llama-quantize calls.

As everywhere else, embedding and head stay as they are; otherwise the mix of types is llama.cpp's.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from exchange import serve
from safetensors.numpy import load_file

TYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
}


def quantize(request: dict[str, Any]) -> None:
    beside, out = Path(request["base"]).parent, Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[request["type"]]
    settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_F32
    settings.quantize_output_tensor = False
    importance = load_file(beside / "importance.safetensors")
    settings.imatrix = _as_matrix(importance)
    files = [str(beside / "base.gguf").encode(), str(out / "model.gguf").encode()]
    failed = llama_cpp.llama_model_quantize(*files, ctypes.byref(settings))
    if failed:
        raise RuntimeError(f"llama_model_quantize ended with {failed}")


def _as_matrix(importance: dict[str, np.ndarray]) -> Any:
    """An array of names, numbers and lengths, ended by an entry without a name."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


if __name__ == "__main__":
    serve(quantize, "llama-cpp-python")
