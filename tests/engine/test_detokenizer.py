"""Text that came piece by piece is the decode of the whole, and no piece ever has to be taken back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aphroquant.engine.detokenizer import ByteLevelDetokenizer, DetokenizerFactory, WindowDetokenizer

TEXTS = [
    "Hello, world! ünïcödé",
    "日本語のテキスト 🎉👩‍👩‍👧",
    "a  b\n\tc don't",
    "𝒳 €uro ¿qué?",
    "",
    " leading",
    "\ufffd literal",
]


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool é>", special=False), AddedToken("<plain>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and the first Mistral have it."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["▁", "▁Hello", "Hello", ",", "▁world", "!", "a", "b", "é", "日", "本", "▁▁"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    make: Callable[[], PreTrainedTokenizerFast] = request.param
    return make()


def whole(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = DetokenizerFactory(tokenizer).make(prompt or [])
    return [*[detokenizer.add(token) for token in tokens], detokenizer.finish()]


def test_the_kind_follows_the_tokenizer() -> None:
    assert isinstance(DetokenizerFactory(byte_level()).make([]), ByteLevelDetokenizer)
    assert isinstance(DetokenizerFactory(byte_fallback()).make([]), WindowDetokenizer)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_whole_decode(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    ids = st.integers(0, len(tokenizer) + 3)  # ids past the tokenizer's exist where a vocabulary is padded
    tokens = data.draw(st.lists(ids, max_size=30))
    known = [token for token in tokens if token < len(tokenizer)]
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, known)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_continue_the_prompt(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    def is_whole(token: int) -> bool:
        return "\ufffd" not in tokenizer.decode([token]) and "<0x" not in tokenizer.convert_ids_to_tokens(token)

    whole_characters = [token for token in range(len(tokenizer)) if is_whole(token)]
    prompt = data.draw(st.lists(st.sampled_from(whole_characters), min_size=1, max_size=12))
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    assume(whole(tokenizer, prompt))  # otherwise the text begins with the output
    continued = whole(tokenizer, prompt) + "".join(pieces(tokenizer, tokens, prompt))
    assert continued == whole(tokenizer, prompt + tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_no_replacement_character_is_shown_for_valid_text(text: str) -> None:
    tokenizer = byte_level()
    shown = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(shown) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_a_character_split_over_tokens_comes_with_its_last_token() -> None:
    tokenizer = byte_fallback()
    tokens = [
        tokenizer.convert_tokens_to_ids(piece) for piece in ("▁Hello", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "!")
    ]
    assert pieces(tokenizer, tokens) == ["Hello", "", "", "", "", "🎉!", ""]


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("é")
    first_byte = tokenizer.convert_tokens_to_ids("Ã")
    assert pieces(tokenizer, [first_byte]) == ["", "\ufffd"]
    assert "".join(pieces(tokenizer, tokens)) == "é"


def test_the_space_before_the_first_word_is_kept_after_a_prompt() -> None:
    tokenizer = byte_fallback()
    hello, world = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁Hello", "▁world"))
    assert pieces(tokenizer, [world], prompt=[hello])[0] == " world"
    assert pieces(tokenizer, [world], prompt=[1, hello, 1, 1, 1, 1, 1])[0] == " world"
    assert pieces(tokenizer, [hello])[0] == "Hello"


def test_special_tokens_have_no_text_but_other_added_tokens_do() -> None:
    tokenizer = byte_level()
    end, plain, tool = (tokenizer.convert_tokens_to_ids(piece) for piece in ("<|end|>", "<plain>", "<tool é>"))
    assert pieces(tokenizer, [end, plain, end, tool]) == ["", "<plain>", "", "<tool é>", ""]


def test_cost_per_token_does_not_grow_with_the_output(tokenizer: PreTrainedTokenizerFast) -> None:
    decoded = 0

    class Counting(DetokenizerFactory):
        def decode(self, tokens: list[int]) -> str:  # type: ignore[override]
            nonlocal decoded
            decoded += len(tokens)
            return super().decode(tokens)

    generator = random.Random(0)
    detokenizer = Counting(tokenizer).make([])
    for _ in range(2000):
        detokenizer.add(generator.randrange(len(tokenizer)))
    detokenizer.finish()
    assert decoded < 2000 * 40


def test_the_text_of_single_tokens_names_special_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    factory = DetokenizerFactory(tokenizer)
    assert factory.token_text(tokenizer.eos_token_id) == tokenizer.eos_token
    assert factory.token_text(len(tokenizer) + 5) == ""
