"""How a worker, which runs in a library's own environment, talks with `scripts/interop.py`.

    python WORKER.py REQUEST.json ...

A request has `task` ("load": read `checkpoint`; "save": quantize the dense `source` into `checkpoint`), `settings` and
`token_ids` [B, S]. The worker writes the weights as the library computes them (MODULE.weight, [N, K]) and its `logits`
[B, S, V] into the safetensors file `output`, and beside it an .answer with remarks, or the library's `error`.

Written for every release of torch and transformers in use; nothing of aphroquant is imported.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def serve(load: Callable[[dict[str, Any]], Any], save: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """Answer the requests on the command line. `load` and `save` return (weights, logits or None, remarks)."""
    torch.set_num_threads(1)
    for path in sys.argv[1:]:
        torch.manual_seed(0)
        request = json.loads(Path(path).read_text())
        request["token_ids"] = torch.tensor(request["token_ids"])
        task = {"load": load, "save": save}[request["task"]]
        assert task is not None
        try:
            remarks = answer(request, *task(request))
        except Exception as error:  # noqa: BLE001 (any error is the library's answer; the others are still asked)
            traceback.print_exc()
            remarks = {"error": f"{type(error).__name__}: {error}"}
        Path(request["output"]).with_suffix(".answer").write_text(json.dumps(remarks))


def answer(
    request: dict[str, Any], weights: dict[str, torch.Tensor], logits: torch.Tensor | None, remarks: dict[str, Any]
) -> dict[str, Any]:
    tensors = {f"{module}.weight": tensor.detach().contiguous().clone() for module, tensor in weights.items()}
    if logits is not None:
        tensors["logits"] = logits.detach().float().contiguous()
    save_file(tensors, request["output"])
    return remarks


def forward(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """The model's logits [B, S, V]."""
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids).logits
    return logits


def used_weights(
    model: Any, is_quantized: Callable[[Any], bool], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """[N, K] of every quantized layer: what its forward gives for the identity, so that all is judged as it is used."""
    return {name: used_weight(layer, dtype) for name, layer in model.named_modules() if is_quantized(layer)}


def used_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    bias, layer.bias = getattr(layer, "bias", None), None
    columns = layer.in_features if hasattr(layer, "in_features") else layer.infeatures
    with torch.no_grad():
        weight: torch.Tensor = layer(torch.eye(columns, dtype=dtype)).T
    layer.bias = bias
    return weight


def calibration_ids(request: dict[str, Any], count: int = 8, length: int = 64) -> Iterable[torch.Tensor]:
    """Random token ids [1, length]; libraries that calibrate take them as they are."""
    generator = torch.Generator().manual_seed(1)
    size = request["settings"].get("vocab_size", 384)
    return [torch.randint(0, size, (1, length), generator=generator) for _ in range(count)]
