"""Makes exl3.json and exl3.safetensors, run once on a GPU (H100, torch 2.11) with exllamav3 1.6.5 unpacked beside it.

`random`: what the library's kernels make of random words and scales, for each codebook and width: the SHA-256 of the
rotated weight, and parts of the weight itself, computed in float16. `quantized`: a known matrix quantized by the
library, its error, and a row of what the library says it has become; the tensors are in the safetensors file.

Only the kernels needed are compiled: sources and bindings of all others take an hour.
"""

import hashlib
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.cpp_extension import load

IN, OUT = 128, 256
CODEBOOKS = {"3inst": (False, False), "mcg": (True, False), "mul1": (False, True)}
WIDTHS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
QUANTIZED = (("mcg", 2), ("mul1", 2.5), ("3inst", 3))
LIBRARY = Path("exllamav3")  # the package's folder out of its wheel
FUNCTIONS = ("reconstruct", "reconstruct_had_slice", "pack_trellis", "pack_trellis_frac", "quantize_tiles",
             "quantize_tiles_frac", "quantize_tiles_scratch")  # fmt: skip


def kernels() -> types.ModuleType:
    sources = LIBRARY / "exllamav3_ext"
    quant = sources / "quant"
    names = ("reconstruct", "pack", "frac", "quantize", "exl3_devctx")
    files = [*(quant / f"{name}.cu" for name in names), *(quant / "comp_units").glob("quantize_tiles*.cu")]
    bindings = Path("bindings.cpp")
    headers = "".join(f'#include "quant/{name}.cuh"\n' for name in ("reconstruct", "pack", "frac", "quantize"))
    entries = "".join(f'm.def("{name}", &{name});\n' for name in FUNCTIONS)
    bindings.write_text(
        f"#include <torch/extension.h>\n{headers}PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{\n{entries}}}\n"
    )
    paths = [str(path) for path in (bindings, *files)]
    return load("exl3_kernels", paths, extra_include_paths=[str(sources)], extra_cuda_cflags=["-O2"])


def words(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    count = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw((count + 3) // 4)
    return torch.from_numpy(raw.view(np.int16)[:count].copy().reshape(shape))


def scales(seed: int, count: int) -> torch.Tensor:
    raw = np.random.PCG64(seed).random_raw(count)
    return torch.from_numpy(((raw % 4001).astype(np.float64) - 2000) / 1024).half()


def known_matrix() -> torch.Tensor:
    """Nearly normal numbers, float32 [IN, OUT]."""
    raw = np.random.PCG64(5).random_raw(IN * OUT).view(np.uint16).reshape(-1, 4).astype(np.float64)
    return torch.from_numpy(((raw.sum(1) - 131070) / 37837 / 50).reshape(IN, OUT)).float()


def random_cases(ext: types.ModuleType) -> dict[str, object]:
    cases = {}
    for number, (codebook, (mcg, mul1)) in enumerate(CODEBOOKS.items()):
        for bits in WIDTHS:
            if bits % 1 and not mul1:
                continue
            seed = int(bits * 10) + 1000 * number
            trellis = words(seed, (IN // 16, OUT // 16, int(16 * bits))).cuda()
            suh, svh = scales(seed + 100, IN).cuda(), scales(seed + 200, OUT).cuda()
            rotated, weight = (torch.zeros(IN, OUT, dtype=torch.half, device="cuda") for _ in range(2))
            ext.reconstruct(rotated, trellis, float(bits), mcg, mul1)
            ext.reconstruct_had_slice(weight, trellis, suh, svh, float(bits), mcg, mul1, 0)
            cases[f"{codebook} {bits:g}"] = {
                "seed": seed,
                "rotated_sha256": hashlib.sha256(rotated.cpu().numpy().tobytes()).hexdigest(),
                "rotated_start": rotated[0, :4].tolist(),
                "row_5": weight[5, ::16].tolist(),
                "row_77": weight[77, 3::16].tolist(),
            }
    return cases


def stub_library(ext: types.ModuleType) -> None:
    """Let the library's quantizer be imported without the rest of it."""

    class Progress:
        def __init__(self, *arguments: object) -> None: ...
        def __enter__(self) -> "Progress":
            return self

        def __exit__(self, *arguments: object) -> None: ...
        def update(self, *arguments: object) -> None: ...
        def new_task(self, *arguments: object) -> None: ...

    for name in ("", ".modules", ".modules.quant", ".util"):
        module = types.ModuleType(f"exllamav3{name}")
        module.__path__ = [str(LIBRARY.joinpath(*name.split(".")[1:]))]
        sys.modules[module.__name__] = module
    sys.modules["exllamav3.util"].cuda_sync_active = torch.cuda.synchronize
    stubs = {
        "ext": {"exllamav3_ext": ext},
        "util.memory": {"free_mem": lambda: None, "list_gpu_tensors": None},
        "util.progress": {"ProgressBar": Progress},
        "util.tensor": {"save_tensor_image": None},
    }
    for name, attributes in stubs.items():
        module = types.ModuleType(f"exllamav3.{name}")
        module.__dict__.update(attributes)
        sys.modules[module.__name__] = module


def quantized_cases() -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    from exllamav3.modules.quant.exl3_lib.quantize import quantize_exl3

    matrix, cases, tensors = known_matrix(), {}, {}
    for codebook, bits in QUANTIZED:
        torch.manual_seed(7)
        inputs = torch.randn(4096, IN, device="cuda") * (1 + torch.arange(IN, device="cuda") / 64)
        hessian = {"H": inputs.T @ inputs, "count": 4096, "num_total": 4096, "finalized": False, "L": None}
        settings = {"K": bits, "seed": 1, "devices": [0], "apply_out_scales": None}
        settings |= {"mcg": codebook == "mcg", "mul1": codebook == "mul1"}
        weight, _, stored = quantize_exl3(matrix.clone().cuda(), hessian, settings, True)
        error = (weight.cpu().double() - matrix).square().sum() / matrix.double().square().sum()
        cases[f"{codebook} {bits:g}"] = {"relative_error": float(error), "row_9": weight[9, ::16].tolist()}
        tensors |= {f"{codebook} {bits:g}/{name}": tensor.cpu().contiguous() for name, tensor in stored.items()}
    return cases, tensors


def main() -> None:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    ext = kernels()
    stub_library(ext)
    quantized, tensors = quantized_cases()
    result = {"in_features": IN, "out_features": OUT, "random": random_cases(ext), "quantized": quantized}
    Path("exl3.json").write_text(json.dumps(result, indent=1) + "\n")
    save_file(tensors, "exl3.safetensors")


if __name__ == "__main__":
    main()
