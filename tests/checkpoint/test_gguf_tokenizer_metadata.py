"""Metadata made from a tokenizer builds a tokenizer with the same ids, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aphroquant.checkpoint.gguf_header import encode_header
from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.checkpoint.gguf_splitting import SPLITTINGS
from aphroquant.checkpoint.gguf_tokenizer import build_tokenizer
from aphroquant.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from aphroquant.errors import UsageError

CORPUS = [
    "The quick brown fox, it's 1984; 3.14159 = pi!\n\n\tHELLO world  hello World",
    "Größe 漢字 don't e\u0301 \u0661\u0662\u0663",
]
TEXTS = [
    "",
    "Hello! How are YOU today? I'LL say it's fine.",
    "In 1984, 2 + 2 made 4; 3.14159 and 1000000.\r\n\r\n  ok   ",
    "Größe, e\u0301, 漢字, \u0661\u0662\u0663\u0664, emoji \N{GRINNING FACE}",
    "<|begin|>user\nHi<|end|>\n<tool>x</tool>",
]
Change = Callable[[Tokenizer], None]


def trained(name: str = "gpt-2", *, change: Change = lambda tokenizer: None, **special: Any) -> PreTrainedTokenizerFast:
    """A small tokenizer that splits as the named one does, with two control tokens and a user-defined one."""
    splitting = SPLITTINGS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting.ignore_merges))
    steps: list[Any] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.expression is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.expression), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.expression is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    change(tokenizer)
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def test_a_tokenizer_of_single_bytes_without_merges_comes_back_from_a_file(tmp_path: Path) -> None:
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}
    bytes_only = models.BPE({"<|begin|>": 0, "<|end|>": 1, **alphabet}, [])

    def replace_model(tokenizer: Tokenizer) -> None:
        tokenizer.model = bytes_only

    original = trained(change=replace_model)
    metadata = tokenizer_metadata(original, 400)
    assert metadata["tokenizer.ggml.merges"] == []
    (tmp_path / "bytes.gguf").write_bytes(encode_header(metadata, {}))
    built = build_tokenizer(read_gguf_header(tmp_path / "bytes.gguf").metadata, 512)
    for text in TEXTS:
        assert built(text).input_ids == original(text).input_ids, text


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_splitting_is_recognised_and_gives_the_same_ids(name: str) -> None:
    original = trained(name)
    metadata = tokenizer_metadata(original, 400)
    found = str(metadata["tokenizer.ggml.pre"])
    assert SPLITTINGS[found] == SPLITTINGS[name]
    built = build_tokenizer(metadata, 512)
    for text in TEXTS:
        assert built(text).input_ids == original(text).input_ids, text
        assert built.decode(built(text).input_ids, skip_special_tokens=True) == original.decode(
            original(text).input_ids, skip_special_tokens=True
        )
    assert (built.bos_token_id, built.eos_token_id, built.pad_token_id) == (0, 1, None)


def test_composing_characters_first_does_not_change_the_name() -> None:
    def compose(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])

    assert tokenizer_metadata(trained("smollm", change=compose), 400)["tokenizer.ggml.pre"] == "smollm"


def test_tokens_have_their_types_and_rows_without_a_token_are_filled_up() -> None:
    metadata = tokenizer_metadata(trained(), 350)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert len(tokens) == len(types) == 350
    assert types.dtype == np.int32
    assert [tokens[i] for i in np.flatnonzero(types == 3)] == ["<|begin|>", "<|end|>"]
    assert [tokens[i] for i in np.flatnonzero(types == 4)] == ["<tool>"]
    unused = [tokens[i] for i in np.flatnonzero(types == 5)]
    assert unused == [f"[PAD{i}]" for i in range(350 - len(unused), 350)]


def test_merges_are_those_of_the_tokenizer() -> None:
    import json

    original = trained()
    pairs = json.loads(original.backend_tokenizer.to_str())["model"]["merges"]
    assert tokenizer_metadata(original, 400)["tokenizer.ggml.merges"] == [" ".join(pair) for pair in pairs]


@pytest.mark.parametrize("ends", ["begin", "both", "none"])
def test_whether_a_beginning_and_an_end_are_added_is_stored(ends: str) -> None:
    from tokenizers import processors

    pattern = {"begin": "<|begin|> $A", "both": "<|begin|> $A <|end|>", "none": "$A"}[ends]

    def add(tokenizer: Tokenizer) -> None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
        )

    original = trained(change=add)
    metadata = tokenizer_metadata(original, 400)
    assert metadata["tokenizer.ggml.add_bos_token"] is (ends != "none")
    assert metadata["tokenizer.ggml.add_eos_token"] is (ends == "both")
    built = build_tokenizer(metadata, 512)
    assert built(TEXTS[1]).input_ids == original(TEXTS[1]).input_ids


def test_chat_templates_are_stored_under_their_names() -> None:
    tokenizer = trained()
    assert "tokenizer.chat_template" not in tokenizer_metadata(tokenizer, 400)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_metadata(tokenizer, 400)["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    metadata = tokenizer_metadata(tokenizer, 400)
    assert metadata["tokenizer.chat_template"] == "a"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "b"


def another_expression(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(r"\w+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def removed_pieces(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(str(SPLITTINGS["qwen2"].expression)), behavior="removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def whitespace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def lowercase(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def whole_words(tokenizer: Tokenizer) -> None:
    tokenizer.model.ignore_merges = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_expression, r"splits by '\\\\w\+'"),
        (removed_pieces, "pre_tokenizer is"),
        (prefix_space, "pre_tokenizer is"),
        (whitespace, "pre_tokenizer is"),
        (lowercase, "normalizer is"),
        (whole_words, "ignore_merges True"),
    ],
)
def test_a_splitting_without_a_name_is_refused(change: Change, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tokenizer_metadata(trained(change=change), 400)
    assert "known are gpt-2" in str(caught.value.hint)


def test_other_models_than_bpe_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UsageError, match="the tokenizer's model is WordLevel"):
        tokenizer_metadata(tokenizer, 400)


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(UsageError, match="the tokenizer ByT5Tokenizer has no tokenizer"):
        tokenizer_metadata(ByT5Tokenizer(), 400)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model only 300 rows of embeddings"):
        tokenizer_metadata(trained(), 300)
