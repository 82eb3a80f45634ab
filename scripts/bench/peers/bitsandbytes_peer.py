"""bitsandbytes' NF4 by transformers: blocks of 64, scales quantized too."""

from __future__ import annotations

from typing import Any

import torch
from exchange import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def quantize(request: dict[str, Any]) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        request["base"], quantization_config=config, device_map=request["device"], dtype=torch.float32
    )
    model.save_pretrained(request["out"])
    AutoTokenizer.from_pretrained(request["base"]).save_pretrained(request["out"])


if __name__ == "__main__":
    serve(quantize, "bitsandbytes", "transformers", "torch")
