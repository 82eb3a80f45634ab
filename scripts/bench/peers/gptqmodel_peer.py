"""GPTQModel: GPTQ or AWQ, by `method`, with its default settings."""

from __future__ import annotations

from typing import Any

from exchange import serve, windows_of
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

PACKED_BY = {"gptq": "auto", "awq": "awq_torch"}  # AWQ's default asks for a GPU before anything is quantized


def quantize(request: dict[str, Any]) -> None:
    config = QuantizeConfig(
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        quant_method=request["method"],
    )
    model = GPTQModel.load(request["base"], config, device=request["device"])
    windows = windows_of(request).tolist()
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    model.quantize(calibration, batch_size=1, backend=PACKED_BY[request["method"]])
    model.save(request["out"])


if __name__ == "__main__":
    serve(quantize, "gptqmodel", "torch")
