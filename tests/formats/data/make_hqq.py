"""Makes hqq.safetensors, run once with the hqq library (0.2.8.post1, torch 2.13): layers as it stores them.

For each layer NAME: `NAME.<tensor>` is its encoded state dict, `NAME.weight` what the library dequantizes it to.
"""

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

LAYERS = [
    # nbits, group_size, axis, (N, K), view_as_float
    *((nbits, 16, axis, (16, 48), False) for nbits in (8, 6, 5, 4, 3, 2, 1.58, 1) for axis in (0, 1)),
    *((nbits, None, axis, (16, 24), False) for nbits in (4, 3) for axis in (0, 1)),
    *((4, 64, axis, (16, 24), False) for axis in (0, 1)),  # groups cross rows
    *((nbits, 16, 1, (16, 48), True) for nbits in (4, 3)),
]


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for nbits, group_size, axis, (n, k), view_as_float in LAYERS:
        name = f"b{nbits:g}-g{group_size}-a{axis}-{n}x{k}{'-float' if view_as_float else ''}".replace(".", "_")
        config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis, view_as_float=view_as_float)
        linear = torch.nn.Linear(k, n, bias=False)
        layer = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
        for suffix, tensor in layer.state_dict().items():
            tensors[f"{name}.{suffix}"] = tensor.contiguous()
        tensors[f"{name}.weight"] = layer.dequantize()
    save_file(tensors, Path(__file__).with_name("hqq.safetensors"))


if __name__ == "__main__":
    main()
