"""The importance matrix that llama.cpp's quantizer asks for: mean squares of the inputs of each linear layer.

It is written beside the dense model, by the names that the layers have in a GGUF file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from exchange import serve, windows_of
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@torch.no_grad()
def measure(request: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32).to(request["device"]).eval()
    found: dict[str, Tensor] = {}
    for number, block in enumerate(model.model.layers):
        for path, name in LAYERS.items():
            hook = partial(_add_squares, found, f"blk.{number}.{name}.weight")
            block.get_submodule(path).register_forward_pre_hook(hook)
    windows = windows_of(request)
    for window in windows:
        model.model(window[None].to(request["device"]), use_cache=False)
    means = {name: (total / windows.numel()).float().cpu() for name, total in found.items()}
    save_file(means, Path(request["base"]).with_name("importance.safetensors"))


def _add_squares(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    squares = inputs[0].double().square().flatten(0, -2).sum(0)
    found[name] = found[name] + squares if name in found else squares


if __name__ == "__main__":
    serve(measure, "torch", "transformers")
