"""GPTQModel: GPTQ or AWQ, by `method`, with its default settings."""

from __future__ import annotations

from typing import Any

from exchange import serve
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]


def quantize(request: dict[str, Any]) -> None:
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        quant_method=request["method"],
    )
    model = GPTQModel.load(request["base"], config, device=request["device"])
    windows = request["token_ids"].tolist()
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows], batch_size=1)
    model.save(request["out"])


if __name__ == "__main__":
    serve(quantize)
