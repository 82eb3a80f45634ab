"""SentencePiece judges: tokenizers built from tokens and scores give its ids, and go through GGUF metadata unchanged.

sentencepiece.json holds two models (with and without a space put before text) that sentencepiece 0.2.3 trained on a few
hundred kilobytes of text (BPE, 480 tokens, byte fallback, identity normalization, split digits, tokens of spaces), and
its ids for texts: words, runs of one character, what no token covers.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aphroquant.checkpoint.gguf_sentencepiece import BYTE_TOKENS, SPACE, merges_of_scores, scores_of_merges
from aphroquant.checkpoint.gguf_tokenizer import build_tokenizer
from aphroquant.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from aphroquant.errors import InputError, UsageError

MODELS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "sentencepiece.json").read_text())
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    model = MODELS[name]
    values = {
        "model": "llama",
        "tokens": model["tokens"],
        "scores": np.array(model["scores"], dtype=np.float32),
        "token_type": np.array(model["types"], dtype=np.int32),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
        "add_space_prefix": name == "prefix",
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items() if value is not None}


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_sentencepieces(name: str) -> None:
    tokenizer = build_tokenizer(metadata_of(name), 512)
    for text, ids in zip(MODELS[name]["texts"], MODELS[name]["ids"], strict=True):
        assert tokenizer(text).input_ids == ids, text
        if SPACE not in text:  # which is how a space is written
            assert tokenizer.decode(ids) == text


def test_a_beginning_and_a_space_are_added_unless_the_file_says_otherwise() -> None:
    tokenizer = build_tokenizer(metadata_of("prefix", add_bos_token=None, add_space_prefix=None), 512)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the").input_ids) == ["<s>", f"{SPACE}the"]


def test_control_tokens_are_matched_and_the_text_after_them_begins_anew() -> None:
    tokenizer = build_tokenizer(metadata_of("prefix"), 512)
    found = tokenizer.convert_ids_to_tokens(tokenizer("the<s>the<tool>").input_ids)
    assert found == [f"{SPACE}the", "<s>", f"{SPACE}the", "<tool>"]
    assert tokenizer.unk_token_id == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_tokenizer_gives_transformers_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(metadata_of(name), 512)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(MODELS[name]["texts"], MODELS[name]["ids"], strict=True):
        assert loaded(text).input_ids == ids, text


@pytest.mark.parametrize("name", MODELS)
def test_metadata_written_of_such_a_tokenizer_builds_it_again(name: str) -> None:
    original = build_tokenizer(metadata_of(name), 512)
    metadata = tokenizer_metadata(original, 500)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (name == "prefix")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, np.ndarray)
    assert tokens[:480] == MODELS[name]["tokens"]
    assert types.tolist()[:480] == MODELS[name]["types"]
    built = build_tokenizer(metadata, 512)
    for text, ids in zip(MODELS[name]["texts"], MODELS[name]["ids"], strict=True):
        assert built(text).input_ids == ids, text


def test_scores_order_the_tokens_as_the_original_ones() -> None:
    model = MODELS["prefix"]
    normal = {t: s for t, s, k in zip(model["tokens"], model["scores"], model["types"], strict=True) if k == NORMAL}
    merges = merges_of_scores(normal)
    scores = scores_of_merges(model["tokens"], model["types"], merges)
    joined = {left + right for left, right in merges}
    order = [i for i, token in enumerate(model["tokens"]) if token in joined]
    ours, theirs = ([values[i] for i in order] for values in (scores, model["scores"]))
    assert sorted(order, key=lambda i: -scores[i]) == sorted(order, key=lambda i: -model["scores"][i])
    assert len(set(ours)) == len(set(theirs)) == len(order)


def test_every_way_to_cut_a_token_is_a_merge_the_longest_left_part_first() -> None:
    scores = {"a": -9.0, "b": -9.0, "aa": -1.0, "aaa": -2.0, "ab": -0.5, "aab": -3.0}
    assert merges_of_scores(scores) == [
        ("a", "b"), ("a", "a"), ("aa", "a"), ("a", "aa"), ("aa", "b"), ("a", "ab"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "merges",
    [[("a", "a"), ("aa", "b")], [("a", "b"), ("aa", "b"), ("a", "a"), ("a", "ab")]],
    ids=["incomplete", "mixed"],
)
def test_merges_that_no_scores_give_are_refused(merges: list[tuple[str, str]]) -> None:
    tokens = ["a", "b", "aa", "ab", "aab"]
    with pytest.raises(UsageError, match="merges do not follow from scores"):
        scores_of_merges(tokens, [NORMAL] * len(tokens), merges)


def byte_fallback(**parts: Any) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<unk>", *BYTE_TOKENS, SPACE, "a", f"{SPACE}a"])}
    model = models.BPE(vocabulary, [(SPACE, "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteFallback()
    for key, value in parts.items():
        setattr(tokenizer, key, value)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(("scheme", "expected"), [("first", True), ("always", True), ("never", False)])
def test_transformers_way_of_writing_spaces_is_understood(scheme: str, expected: bool) -> None:
    metaspace = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    assert (
        tokenizer_metadata(byte_fallback(pre_tokenizer=metaspace), 300)["tokenizer.ggml.add_space_prefix"] is expected
    )


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"pre_tokenizer": pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=True)},
        {"pre_tokenizer": pre_tokenizers.ByteLevel()},
        {"normalizer": normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", SPACE)])},
    ],
    ids=["nothing", "split", "byte level", "normalized"],
)
def test_other_treatments_of_spaces_are_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="are not SentencePiece's"):
        tokenizer_metadata(byte_fallback(**parts), 300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores must be 480 finite numbers"),
        ({"scores": np.zeros(3, np.float32)}, "scores must be 480 finite numbers"),
        ({"scores": np.full(480, np.nan, np.float32)}, "scores must be 480 finite numbers"),
        ({"scores": [0.0] * 480}, "scores must be 480 finite numbers"),
        ({"tokens": [*MODELS["prefix"]["tokens"][:-1], "<s>"]}, "tokens has 1 tokens twice"),
        ({"tokens": [*MODELS["prefix"]["tokens"][:-1], "y" * 2000]}, "a token of 2000 characters; 1024 can be"),
        ({"tokens": [t.replace("<0x41>", "<A>") for t in MODELS["prefix"]["tokens"]]}, "has no <0x41>"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is not supported"),
    ],
)
def test_metadata_that_is_missing_or_odd_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tokenizer(metadata_of("prefix", **changes), 512)
