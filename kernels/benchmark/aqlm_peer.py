"""The kernels of the aqlm package, built from the wheel in a folder of peers by nvcc, called without its own wrapper.

The wrapper multiplies by the scales in two further launches; here too, so that the result is the layer's.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.errors import UsageError
from aphroquant.schemes import AdditiveScheme, QuantizedWeight, Scheme

PATTERN = "aqlm*.whl"
_SOURCE = "aqlm/inference_kernels/cuda_kernel.cu"
_TYPES = {torch.bfloat16: "Lb1E", torch.float16: "Lb0E"}
_ENTRIES = {
    (2, 8): "_Z19code2x8_matvec_cudaI{}EvPKvS1_PvS1_ii",
    (1, 16): "_Z20code1x16_matvec_cudaI{}Lm8EEvPKvS1_PvS1_ii",
}


def takes(scheme: Scheme, folder: Path) -> bool:
    """Whether the package is there and has a kernel for the scheme."""
    return (
        isinstance(scheme, AdditiveScheme)
        and (scheme.num_codebooks, scheme.code_bits) in _ENTRIES
        and (scheme.in_group, scheme.out_group) == (8, 1)
        and any(folder.glob(PATTERN))
    )


def prepare(weight: QuantizedWeight, folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Row after row, as the package does it."""
    scheme = weight.scheme
    assert isinstance(scheme, AdditiveScheme)
    entry = _ENTRIES[scheme.num_codebooks, scheme.code_bits].format(_TYPES[dtype])
    kernel = getattr(_library(folder), entry)
    codes = weight["codes"].to(torch.int16 if scheme.code_bits > 8 else torch.uint8).clone()
    books, scales = weight["codebooks"].to(dtype).contiguous(), weight["scales"].to(dtype)
    rows, columns = weight.shape

    def run(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], rows)
        for token in range(x.shape[0]):
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (codes, x[token], out[token], books)]
            kernel(*pointers, rows, columns)
        out *= scales
        return out.clone()

    return run


@cache
def _library(folder: Path) -> ctypes.CDLL:
    """UsageError with the compiler's last words if it cannot be built."""
    directory = Path(tempfile.mkdtemp(prefix="aphroquant-peers-"))
    with zipfile.ZipFile(sorted(folder.glob(PATTERN))[0]) as wheel:
        source = wheel.extract(_SOURCE, directory)
    root, library = Path(torch.__file__).parent, directory / "aqlm.so"
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC", "-w"]
    command += ["-I", str(root / "include"), source, "-L", str(root / "lib"), "-lc10_cuda", "-lc10", "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UsageError("the aqlm package's kernels need nvcc to be built") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"the aqlm package's kernels cannot be built: {error.stderr.strip()[-300:]}") from error
    return ctypes.CDLL(str(library))
