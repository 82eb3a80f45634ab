"""Loads what we write in an outside library that needs an environment of its own, and compares weights and logits.

    ./scripts/interop gptqmodel                  tiny random models in every setting that GPTQ and AWQ have
    ./scripts/interop gptqmodel DIR [DIR ...]    these GPTQ or AWQ checkpoints

The environment is made once, in ~/.cache/aphroquant/interop or $APHROQUANT_CACHE/interop. For each checkpoint the
reference is a dense transformers model with our dequantized weights; compared are

    equal    the layers whose weight, as the library computes it, is bit for bit ours in float16
    fp32     largest difference of float32 logits: the library's float16 weights against our float32 ones
    own      the same for the library's own float16 forward
    hf       the same for transformers, which loads GPTQ and AWQ through GPTQModel (not overrides of single modules)

relative to the largest logit. It fails (exit code 4) unless all weights are equal and the others within TOLERANCES. The
last line on stdout is the same as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORKER = ROOT / "tests" / "interop" / "gptqmodel_worker.py"
GPTQMODEL_VERSION = "7.6.0"  # 7.7.0 needs torch >= 2.14.1, whose default build brings gigabytes of CUDA
TOLERANCES = {"fp32": 0.01, "own": 0.05, "hf": 0.05}  # float16 rounding of weights; and of every activation
EXIT_DIFFERENT = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    libraries = parser.add_subparsers(dest="library", required=True)
    gptqmodel = libraries.add_parser("gptqmodel", help="GPTQModel, and transformers through it")
    gptqmodel.add_argument("checkpoints", nargs="*", type=Path, metavar="DIR")
    gptqmodel.add_argument("--gptqmodel-version", default=GPTQMODEL_VERSION)
    gptqmodel.add_argument("--torch-version", help="default: the release that this environment has")
    options = parser.parse_args()
    python = environment(options.gptqmodel_version, options.torch_version or own_torch_version())
    with tempfile.TemporaryDirectory(prefix="aphroquant-interop-") as folder:
        paths = options.checkpoints or tiny_checkpoints(Path(folder))
        results = [compare(python, path, Path(folder)) for path in paths]
    print(json.dumps({"library": f"gptqmodel {options.gptqmodel_version}", "results": results}))
    return 0 if all(result["passed"] for result in results) else EXIT_DIFFERENT


def environment(version: str, torch_version: str) -> Path:
    """The interpreter of an environment with GPTQModel, made if it is not there."""
    cache = Path(os.environ.get("APHROQUANT_CACHE") or Path.home() / ".cache" / "aphroquant").expanduser()
    folder = cache / "interop" / f"gptqmodel-{version}"
    python, complete = folder / "bin" / "python", folder / ".complete"
    if not complete.exists():
        print(f"making {folder} (a few minutes) ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        torch = f"torch=={torch_version}"
        subprocess.run([*install, torch, "wheel", "setuptools"], check=True)
        subprocess.run([*install, f"gptqmodel=={version}", "optimum", torch], check=True)
        complete.touch()
    return python


def own_torch_version() -> str:
    import torch

    return str(torch.__version__).split("+")[0]


def compare(python: Path, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """One line of the table, printed, and its figures."""
    reference = folder / "reference.safetensors"
    write_reference(checkpoint, reference)
    environ = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, WORKER, checkpoint.resolve(), reference]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"error: {checkpoint} does not load (exit code {done.returncode})")
    result: dict[str, Any] = {"checkpoint": checkpoint.name, **json.loads(last)}
    differences = {name: result[name] for name in TOLERANCES if result[name] is not None}
    within = all(difference <= TOLERANCES[name] for name, difference in differences.items())
    result["passed"] = within and result["equal"] == result["layers"] > 0
    columns = "  ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    verdict = "passed" if result["passed"] else "FAILED"
    equal = f"equal {result['equal']}/{result['layers']}"
    print(f"{checkpoint.name:20} {result['kernel']:16} {equal}  {columns}  {verdict}", file=sys.stderr)
    return result


def write_reference(checkpoint: Path, path: Path) -> None:
    """The dequantized model (float32), tokens, and its logits, in one safetensors file for the worker."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from aphroquant.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    settings = {key: value for key, value in opened.config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(opened.config["model_type"], **settings), dtype=torch.float32
    ).eval()
    state = {f"{module}.weight": opened.weight(module).dequantize() for module in opened.schemes()}
    state |= {name: opened.read(name).float() for name in opened.dense_names() if name not in state}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if opened.config.get("tie_word_embeddings") else set()
    if unexpected or set(missing) - tied:
        raise SystemExit(f"error: {checkpoint}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    token_ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(token_ids).logits
    save_file({**state, "interop.token_ids": token_ids, "interop.logits": logits}, path)


def tiny_checkpoints(folder: Path) -> Iterator[Path]:
    """A tiny Llama in every setting that GPTQ and AWQ have."""
    import torch

    from aphroquant.formats import format_class
    from aphroquant.schemes import DenseScheme, IntegerScheme, Scheme

    sizes = {"hidden_size": 128, "intermediate_size": 256}
    source = load_module(ROOT / "tests" / "conftest.py")._write_tiny_checkpoint(folder / "source", "llama", sizes)
    quantize_checkpoint = load_module(ROOT / "tests" / "interop" / "checkpoints.py").quantize_checkpoint

    def mixed(module: str) -> Scheme:
        if "layers.0" in module:
            return IntegerScheme(8, None, symmetric=True)
        return DenseScheme(torch.float32) if "up_proj" in module else IntegerScheme(4, 32, symmetric=False)

    settings: dict[str, Any] = {
        "gptq-4-symmetric": lambda module: IntegerScheme(4, 32, symmetric=True),
        "gptq-4-asymmetric": lambda module: IntegerScheme(4, 32, symmetric=False),
        "gptq-4-act-order": lambda module: IntegerScheme(4, 32, symmetric=False, act_order=True),
        "gptq-2-asymmetric": lambda module: IntegerScheme(2, 16, symmetric=False),
        "gptq-3-asymmetric": lambda module: IntegerScheme(3, 64, symmetric=False),
        "gptq-8-channel": lambda module: IntegerScheme(8, None, symmetric=True),
        "gptq-mixed": mixed,
        "awq-symmetric": lambda module: IntegerScheme(4, 32, symmetric=True),
        "awq-asymmetric": lambda module: IntegerScheme(4, 64, symmetric=False),
    }
    for name, scheme_of in settings.items():
        quantize_checkpoint(source, folder / name, format_class(name.split("-")[0]), scheme_of)
        yield folder / name


def load_module(path: Path) -> Any:
    """A file of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(f"interop_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
