"""Makes modelopt.safetensors and modelopt.json, run once with nvidia-modelopt (0.47.0, torch 2.13): its own exports.

A llama of one layer for each algorithm ALGORITHM: `ALGORITHM/<name>` is each stored tensor, and
`ALGORITHM/<module>.dequantized` what the library makes of a four-bit one. The JSON has the configs.
"""

import json
import tempfile
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

ALGORITHMS = {
    "FP8": mtq.FP8_DEFAULT_CFG,
    "FP8_PER_CHANNEL_PER_TOKEN": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "NVFP4": mtq.NVFP4_DEFAULT_CFG,
    "W4A16_NVFP4": mtq.W4A16_NVFP4_CFG,
}


def main() -> None:
    torch.manual_seed(0)
    tensors, configs = {}, {}
    for algorithm, settings in ALGORITHMS.items():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=False,
                architectures=["LlamaForCausalLM"],
            )
        ).to(torch.bfloat16)
        if algorithm == "NVFP4":
            settings = mtq.utils.update_quant_cfg_with_kv_cache_quant(settings, mtq.FP8_KV_CFG["quant_cfg"])
        mtq.quantize(model, settings, lambda model: model(torch.arange(32)[None]))
        with tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(model, export_dir=folder)
            stored = load_file(f"{folder}/model.safetensors")
            configs[algorithm] = {
                name: json.loads(Path(folder, name).read_text()) for name in ("config.json", "hf_quant_config.json")
            }
        for name, tensor in stored.items():
            tensors[f"{algorithm}/{name}"] = tensor
            module = name.removesuffix(".weight")
            if tensor.dtype == torch.uint8:
                shape = (tensor.shape[0], tensor.shape[1] * 2)
                tensors[f"{algorithm}/{module}.dequantized"] = NVFP4QTensor(shape, torch.float32, tensor).dequantize(
                    torch.float32,
                    scale=stored[f"{module}.weight_scale"],
                    double_scale=stored[f"{module}.weight_scale_2"],
                    block_sizes={-1: 16},
                )
    folder = Path(__file__).parent
    save_file(tensors, folder / "modelopt.safetensors")
    (folder / "modelopt.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main()
