"""SentencePiece BPE (`tokenizer.ggml.model` = "llama"): the merges from the scores, and the scores from the merges.

SentencePiece joins the neighbours whose union is the token of the highest score, wherever it came from; a
tokenizer.json lists the pairs in order. So each token gives every pair that it can be cut into, and the pairs stand in
the order of their unions' scores. Of the pairs of one token the one with the longest left part comes first: in a run of
one character, which is where they compete, SentencePiece joins from the left and has its short remainder on the right.

Spaces are written as U+2581 and what is in no token as bytes. llama.cpp puts a space before text after every control
token, not only at the start; so does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aphroquant.checkpoint.gguf_splitting import TokenType
from aphroquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
MAX_TOKEN_LENGTH = 1024  # of a token that is cut: cutting takes the square of it

Pair = tuple[str, str]


def sentencepiece_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: str | None, *, add_space: bool
) -> Tokenizer:
    """The tokenizer, without added tokens. InputError naming what is missing."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    missing = next((token for token in BYTE_TOKENS if token not in vocabulary), None)
    if missing is not None:
        raise InputError(f"tokenizer.ggml.tokens has no {missing}; without all bytes not every text has tokens")
    merges = merges_of_scores(
        {
            token: score
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind == TokenType.NORMAL and token
        }
    )
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if add_space else [spaces])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space else steps)
    return tokenizer


def merges_of_scores(scores: Mapping[str, float]) -> list[Pair]:
    """Pairs of tokens whose union is a token, in the order in which SentencePiece would join them."""
    found: list[tuple[float, int, int, Pair]] = []
    for index, (token, score) in enumerate(scores.items()):
        if len(token) > MAX_TOKEN_LENGTH:
            raise InputError(f"tokenizer.ggml.tokens has a token of {len(token)} characters; {MAX_TOKEN_LENGTH} can be")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                found.append((-score, index, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def scores_of_merges(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Pair]) -> list[float]:
    """A score for every token from which the same pairs follow. UsageError if they follow from none.

    A token's score is minus its rank among those that merges make; single characters come after all of them.
    """
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = {
        token: -float(ranks.get(token, len(ranks)))
        for token, kind in zip(tokens, types, strict=True)
        if kind == TokenType.NORMAL
    }
    followed = merges_of_scores(scores)
    if set(followed) != set(merges) or [left + right for left, right in followed] != [a + b for a, b in merges]:
        raise UsageError(
            "the tokenizer's merges do not follow from scores of its tokens, which is what GGUF holds for SentencePiece"
        )
    return [scores.get(token, 0.0) for token in tokens]


def adds_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json of this kind puts a space before text. UsageError if it is of no known form."""
    normalizer, pre_tokenizer = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = {"type": "Prepend", "prepend": SPACE}
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    if pre_tokenizer is None and steps in ([before, spaces], [spaces]):
        return before in steps
    if not steps and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        scheme = pre_tokenizer["prepend_scheme"]
        if pre_tokenizer == {**pre_tokenizer, "replacement": SPACE, "split": False}:
            return bool(scheme != "never")
    raise UsageError(
        f"the tokenizer's normalizer {normalizer} and pre_tokenizer {pre_tokenizer} are not SentencePiece's, "
        "which GGUF needs with byte fallback"
    )
