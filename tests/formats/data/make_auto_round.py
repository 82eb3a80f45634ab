"""Makes auto_round.safetensors and auto_round.json, run once with auto-round (0.16.1, torch 2.13): its own exports.

`python make_auto_round.py MODEL` with a tiny llama of two layers and its tokenizer. For each export EXPORT:
`EXPORT/<name>` is each stored tensor of two modules of the second layer, one with settings of its own; `dense/<name>`
are the weights that were quantized. The JSON has the quantization_config of each.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPORTS = {
    "sym4": ("auto_round", True, 4),
    "asym4": ("auto_round", False, 4),
    "asym2": ("auto_round", False, 2),
    "gptq4": ("auto_round:auto_gptq", False, 4),
    "gptqmodel3": ("auto_round:gptqmodel", False, 3),
    "awq4": ("auto_round:auto_awq", False, 4),
}
MODULES = ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def main(source: str) -> None:
    tensors, configs = {}, {}
    for export, (packing_format, sym, bits) in EXPORTS.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        for module in MODULES:
            tensors[f"dense/{module}.weight"] = model.get_submodule(module).weight.detach().clone()
        own = {"group_size": 64} if "awq" in export else {"group_size": 64, "bits": 8}
        layers = {"model.layers.0.mlp.down_proj": {"bits": 16}, MODULES[1]: own}
        rounder = AutoRound(
            model,
            AutoTokenizer.from_pretrained(source),
            bits=bits,
            group_size=32,
            sym=sym,
            iters=0,
            disable_opt_rtn=True,
            layer_config=layers,
        )
        with tempfile.TemporaryDirectory() as folder:
            rounder.quantize_and_save(folder, format=packing_format)
            (found,) = Path(folder).rglob("config.json")
            configs[export] = json.loads(found.read_text())["quantization_config"]
            for name, tensor in load_file(found.parent / "model.safetensors").items():
                if name.startswith(MODULES):
                    tensors[f"{export}/{name}"] = tensor.contiguous()
    folder = Path(__file__).parent
    save_file(tensors, folder / "auto_round.safetensors")
    (folder / "auto_round.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
