"""Tokenizers built from GGUF metadata give the ids of the tokenizer that the metadata was made from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.gguf_reader import read_gguf_header
from aphroquant.checkpoint.gguf_splitting import SPLITTINGS
from aphroquant.checkpoint.gguf_tokenizer import build_tokenizer
from aphroquant.errors import InputError

Tiny = Callable[..., Path]
TEXTS = [
    "",
    "Hello! How are you today?",
    "In 1984, 2 + 2 made 4; 3.14159 and 1000000.",
    "emoji \N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}, Größe, e\u0301, 漢字, \u0661\u0662\u0663",
    "def forward(self, x):\n    return x * 2\n\n\n# it's, they'RE\r\n\t\ttabs  ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    " <|im_end|>x<|endoftext|><|im_",
]


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text).input_ids
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ids_are_those_of_the_original_tokenizer(family: str, tiny_gguf: Tiny, tiny_checkpoint: Tiny) -> None:
    built = open_checkpoint(tiny_gguf(family)).tokenizer()
    original = AutoTokenizer.from_pretrained(tiny_checkpoint(family))
    for text in TEXTS:
        # the tiny qwen3 tokenizer splits as GPT-2 does; only its files, not its metadata, can say so
        if family != "qwen3":
            assert ids(built, text) == ids(original, text), text
        assert built.decode(ids(built, text)) == (text if family == "llama" else composed(text))
    assert built.chat_template == original.chat_template
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(built, name) == getattr(original, name)


def composed(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


# transformers gives every qwen2 model qwen2's own pre-tokenizer
@pytest.mark.parametrize(
    ("family", "pre"),
    [("qwen2", "qwen2"), *((f, p) for f in ("llama", "qwen3") for p in ("smollm", "llama-bpe", "qwen2", "default"))],
)
def test_saved_tokenizers_give_transformers_the_same_ids(
    family: str, pre: str, tiny_gguf: Tiny, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(tiny_gguf(family, "F32", {"tokenizer.ggml.pre": pre}))
    checkpoint.save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    built, loaded = checkpoint.tokenizer(), AutoTokenizer.from_pretrained(tmp_path)
    assert [ids(loaded, text) for text in TEXTS] == [ids(built, text) for text in TEXTS]
    assert loaded.chat_template == built.chat_template
    assert loaded.special_tokens_map.items() >= built.special_tokens_map.items()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_qwen2s_expression_is_transformers_own() -> None:
    assert SPLITTINGS["qwen2"].expression == PRETOKENIZE_REGEX


@pytest.mark.sample_model
def test_the_sample_models_digits_stand_alone_and_the_rest_is_transformers(sample_model: Path) -> None:
    tokenizer = open_checkpoint(sample_model).tokenizer()
    judge = AutoTokenizer.from_pretrained(sample_model.parent, gguf_file=sample_model.name)
    for text in TEXTS:
        if not any(character.isnumeric() for character in text):  # transformers loses the splitting of digits
            assert ids(tokenizer, text) == ids(judge, text), text
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "a1984b")) == ["a", "1", "9", "8", "4", "b"]
    pieces = tokenizer.convert_ids_to_tokens(ids(tokenizer, " 42"))
    assert pieces == ["Ġ", "4", "2"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_a_beginning_token_is_added_where_the_file_says_so(tiny_gguf: Tiny, tmp_path: Path) -> None:
    for pre, flag, expected in [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
        ("gpt-2", None, False),
    ]:
        changes = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
        tokenizer = open_checkpoint(tiny_gguf("llama", "F32", changes)).tokenizer()
        assert (ids(tokenizer, "Hello")[0] == tokenizer.bos_token_id) is expected, (pre, flag)
        assert ids(tokenizer, "Hello").count(tokenizer.bos_token_id) == int(expected)
        tokenizer.save_pretrained(tmp_path / f"{pre}{flag}")
        loaded = AutoTokenizer.from_pretrained(tmp_path / f"{pre}{flag}")
        assert ids(loaded, "Hello") == ids(tokenizer, "Hello")


def test_user_defined_tokens_stay_whole_and_are_not_special(tiny_gguf: Tiny, tiny_checkpoint: Tiny) -> None:
    metadata = dict(read_gguf_header(tiny_gguf("llama")).metadata)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "<tool call>"]
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:-1]
    types = metadata["tokenizer.ggml.token_type"].copy()
    types[-1] = 4
    metadata["tokenizer.ggml.token_type"] = types
    tokenizer = build_tokenizer(metadata, 100)
    found = ids(tokenizer, "a<tool call>b")
    assert found[1] == len(types) - 1
    assert tokenizer.decode(found, skip_special_tokens=True) == "a<tool call>b"
    assert tokenizer.decode(ids(tokenizer, "a<|im_end|>b"), skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "the pre-tokenizer 'martian' is unknown; known are gpt-2, default"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.scores must be 360 finite numbers"),
        ({"tokenizer.ggml.model": None}, "the tokenizer model None cannot be rebuilt exactly; gpt2 and llama can"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab', which is no pair"),
        ({"tokenizer.ggml.merges": ["a \u2603"]}, "'\u2603', which is no token"),
        ({"tokenizer.ggml.tokens": ["a", "a", "b"]}, "token_type must be 3 numbers"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must be 360 numbers"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "eos_token_id = 100000 is no token of 360"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id = 'x' is no token"),
    ],
)
def test_a_tokenizer_that_cannot_be_exact_is_an_input_error(
    changes: dict[str, Any], message: str, tiny_gguf: Tiny
) -> None:
    checkpoint = open_checkpoint(tiny_gguf("llama", "F32", changes))
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.tokenizer()
    assert ".gguf" in caught.value.message


def test_a_tokenizer_beside_the_file_is_preferred(tiny_gguf: Tiny, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny_gguf("llama", "F32", {"tokenizer.ggml.pre": "martian"}).read_bytes())
    source = tiny_checkpoint("llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert ids(checkpoint.tokenizer(), TEXTS[1]) == ids(AutoTokenizer.from_pretrained(source), TEXTS[1])
    assert [path.name for path in checkpoint.carried_files()] == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_file_alone_carries_nothing(tiny_gguf: Tiny) -> None:
    assert open_checkpoint(tiny_gguf("llama")).carried_files() == []
