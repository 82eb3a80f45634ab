"""Token windows: the same teacher-forced input for both models.

The text is one stream of tokens without a BOS, cut into chunks of `window_len`; of its C whole chunks the windows are
numbers floor(i * C / W), so that they spread over the whole text, or, with a seed, W random ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aphroquant.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_CHARACTERS = 100_000  # of the text, that both tokenizers must split alike


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the text, with no special tokens added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def token_windows(
    token_ids: list[int], windows: int, window_len: int, seed: int | None = None, name: str = "text"
) -> Tensor:
    """int64 [W, window_len]; W is `windows`, or the number of whole chunks if there are fewer."""
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"seed = {seed} must be between 0 and 2**63 - 1")
    num_chunks = len(token_ids) // window_len
    if num_chunks == 0:
        raise InputError(
            f"{name}: the evaluation text has {len(token_ids)} tokens, too few for one window of {window_len}",
            hint="give a longer text or a smaller window length",
        )
    chunks = torch.tensor(token_ids[: num_chunks * window_len]).view(num_chunks, window_len)
    windows = min(windows, num_chunks)
    if seed is None:
        return chunks[[i * num_chunks // windows for i in range(windows)]]
    order = torch.randperm(num_chunks, generator=torch.Generator().manual_seed(seed))
    return chunks[order[:windows].sort().values]


def _is_a_token(entry: tuple[str, int]) -> bool:
    """Not what a GGUF file has for rows of the embedding that no token of the tokenizer belongs to."""
    return entry[0] != f"[PAD{entry[1]}]"


def check_same_tokens(
    base: PreTrainedTokenizerBase, model: PreTrainedTokenizerBase, text: str, names: tuple[str, str]
) -> None:
    """Raise UsageError unless both tokenizers have one vocabulary and split the beginning of the text alike."""
    vocabulary, other = base.get_vocab(), model.get_vocab()
    differing = sorted(filter(_is_a_token, vocabulary.items() ^ other.items()), key=lambda item: item[1])
    if differing:
        token = differing[0][0]
        found = [str(v.get(token, "absent")) for v in (vocabulary, other)]
        raise UsageError(
            f"the vocabularies differ in {len({token for token, _ in differing})} tokens: "
            f"{token!r} is {found[0]} in {names[0]} and {found[1]} in {names[1]}"
        )
    ours, theirs = encode(base, text[:PROBE_CHARACTERS]), encode(model, text[:PROBE_CHARACTERS])
    if ours != theirs:
        place = next(
            i for i, pair in enumerate(zip([*ours, None], [*theirs, None], strict=False)) if len(set(pair)) > 1
        )
        raise UsageError(
            f"the tokenizers of {names[0]} and {names[1]} split the evaluation text differently, from token {place} on",
            hint="copy the base model's tokenizer.json beside the quantized weights",
        )
