"""Fixtures for all tests: seeds, the packaged sample model, and tiny random checkpoints of every family.

Heavy imports stand inside the fixtures: a test of the command line or the scheduler should not wait for transformers.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TinyCheckpoint = Callable[..., Path]
# Steps on matrices of tiny models take ten times as long with two threads as with one. Tests of threads say how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_CORPUS = """\
The quick brown fox jumps over the lazy dog. A model is quantized, measured, and then it answers questions.
Hello! How are you today? I am fine, thank you; what is the capital of France? The capital of France is Paris.
def forward(self, hidden): return self.norm(hidden) * 2 + 1  # weights are stored in groups of 32 columns
In 1984, 2 + 2 made 4; 10, 20 and 300 are numbers, and so is 3.14159. user system assistant user assistant
"""
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state, of those generators that are loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """The GGUF file of the sample model (SmolLM2-135M-Instruct, Q4_1), downloaded once into the user's cache."""
    script = Path(__file__).parent.parent / "scripts" / "fetch_sample.py"
    spec = importlib.util.spec_from_file_location("fetch_sample", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path: Path = module.sample_model()
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """`tiny_checkpoint(family, **overrides)`: path of a random Hugging Face checkpoint, made once a session.

    `overrides` are keys of config.json, and `torch_dtype` (default "float32") and `max_shard_size` of the files.
    Copy the directory before changing anything in it.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = _write_tiny_checkpoint(tmp_path_factory.mktemp(f"tiny-{family}"), family, overrides)
        return made[key]

    return make


def _write_tiny_checkpoint(folder: Path, family: str, overrides: dict[str, Any]) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    overrides = dict(overrides)
    dtype = getattr(torch, overrides.pop("torch_dtype", "float32"))
    max_shard_size = overrides.pop("max_shard_size", "5GB")
    tokenizer = _tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if family == "qwen3" else 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # the default 0.02 gives logits too flat to tell tokens apart
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family, **settings | overrides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms start as ones and biases as zeros, and would hide mistakes
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def _tiny_tokenizer() -> Any:
    """A byte-level BPE trained on a few lines, with ChatML markers: any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
