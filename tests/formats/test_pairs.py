"""The page formats/README.md says what `convert` does: every pair is tried, and lossless means the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.formats import FORMATS

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
PAGE = Path(__file__).parent.parent.parent / "formats" / "README.md"
ROUNDING = 2**-23  # of the global scale, and of its product with a block's scale


def test_every_pair_is_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from conversion_pairs.page import render
    from conversion_pairs.pairs import LOSSLESS, ROUNDED, TARGETS, try_pairs
    from conversion_pairs.shapes import measure_sizes

    assert {*TARGETS, "exl3"} == {*FORMATS, "gguf"}
    pairs = []
    for pair, out, weights in try_pairs(tmp_path):
        pairs.append(pair)
        if pair.verdict not in (LOSSLESS, ROUNDED):
            assert pair.reason
            assert not out.exists()
            continue
        found = open_checkpoint(out)
        for module, weight in weights.items():
            exact, kept = weight.dequantize(), found.weight(module).dequantize()
            if pair.verdict == LOSSLESS:
                assert torch.equal(exact.view(torch.int32), kept.view(torch.int32)), f"{pair}: {module}"
            else:
                assert bool(((exact - kept).abs() <= ROUNDING * exact.abs()).all()), f"{pair}: {module}"
    assert render(pairs, measure_sizes()) == PAGE.read_text(encoding="utf-8"), "run ./scripts/pairs.py"
