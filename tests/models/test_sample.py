"""The forward on real weights: large activations and sharp attention, which random models do not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aphroquant.calibration.data import default_text
from aphroquant.checkpoint import open_checkpoint
from aphroquant.models.streamed import StreamedModel


@pytest.mark.sample_model
def test_logits_of_the_sample_model_equal_those_of_transformers(sample_model: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = open_checkpoint(sample_model)
    tokens = torch.tensor([checkpoint.tokenizer().encode(default_text("evaluation")[:400])])
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config), dtype=torch.float32)
    theirs.to_empty(device="cpu")
    theirs.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors}, strict=False)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its frequencies are not in the file
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    model = StreamedModel(checkpoint)
    logits = model.logits(model.hidden_states(tokens)[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)  # logits spread over 40
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
