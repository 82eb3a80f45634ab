"""AutoRound with its default settings: 200 iterations, batches of 8 windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from auto_round import AutoRound  # type: ignore[import-not-found]
from exchange import lift, serve, windows_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(request: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(request["base"], dtype="auto")
    windows = windows_of(request)
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request["base"]),
        bits=request["bits"],
        group_size=request["group_size"],
        sym=request["symmetric"],
        dataset=[window[None] for window in windows],
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map=request["device"],
        enable_torch_compile=False,
    )
    rounding.quantize_and_save(request["out"], format="auto_round")
    lift(Path(request["out"]))


if __name__ == "__main__":
    serve(quantize, "auto-round", "torch")
