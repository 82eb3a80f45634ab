"""The tokenizer files of the corpus: a small byte-level BPE with a chat template."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

TEXT = """\
The quick brown fox jumps over the lazy dog. A model is quantized, measured, and then it answers questions.
Hello! How are you today? I am fine, thank you; what is the capital of France? The capital of France is Paris.
"""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def _trained() -> tuple[list[str], list[str], dict[str, bytes]]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    import json

    merges = [" ".join(pair) for pair in json.loads(files["tokenizer.json"])["model"]["merges"]]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token for token, _ in vocabulary], merges, files


def tokenizer_files() -> dict[str, bytes]:
    return dict(_trained()[2])


def tokens() -> list[str]:
    return _trained()[0]


def merges() -> list[str]:
    return _trained()[1]
