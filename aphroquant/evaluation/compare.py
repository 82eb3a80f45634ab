"""evaluate(): two checkpoints, the same token windows, the same arithmetic, every figure from one pass.

Both models are streamed block by block, one after the other, and only their last hidden states are kept. Logits exist
for a few hundred positions at a time: [windows, window_len, vocabulary] would be gigabytes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.devices import torch_device
from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation.positions import Positions, compare_logits
from aphroquant.evaluation.result import Evaluation, Protocol
from aphroquant.evaluation.size import stored_size
from aphroquant.evaluation.summary import summarize
from aphroquant.evaluation.texts import read_texts
from aphroquant.evaluation.windows import check_same_tokens, encode, token_windows
from aphroquant.kernels.reference.linear import ReferenceLinear
from aphroquant.models.decoder import Linear
from aphroquant.models.streamed import CPU, StreamedModel
from aphroquant.schemes import QuantizedWeight

LOGIT_ROWS = 256  # positions whose logits of both models exist at once
OnProgress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


def evaluate(
    model: str | Path,
    *,
    against: str | Path,
    texts: Sequence[str | Path] | str | Path | None = None,
    windows: int = 8,
    window_len: int = 1024,
    seed: int | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Measure `model` against its base on the same `windows` of `window_len` tokens, in float32.

    Weights count as they dequantize, and inputs of linears are rounded where a scheme quantizes activations.
    `texts` are paths of UTF-8 files; without them a bundled text is used that calibration never sees. Windows are
    evenly spaced over the text, or drawn with `seed`. `device` is "auto" (a GPU if there is one), "cpu" or "cuda".
    Raises UsageError if the two do not share their tokens.
    """
    started = time.monotonic()
    _check_windows(windows, window_len)
    computes_on = torch_device(device)
    base, candidate = open_checkpoint(against), open_checkpoint(model)
    _check_lengths(base, candidate, window_len)
    text, sources = read_texts(texts)
    tokenizer = base.tokenizer()
    check_same_tokens(tokenizer, candidate.tokenizer(), text, (base.source, candidate.source))
    token_ids = encode(tokenizer, text)
    batch = token_windows(token_ids, windows, window_len, seed)
    vocab_size = min(max(tokenizer.get_vocab().values()) + 1, base.spec.vocab_size, candidate.spec.vocab_size)
    positions = compare_models(base, candidate, batch, vocab_size, on_progress, computes_on)
    protocol = Protocol(
        texts=sources,
        num_text_tokens=len(token_ids),
        windows=len(batch),
        requested_windows=windows,
        window_len=window_len,
        scored_tokens=len(positions.kld),
        seed=seed,
        vocab_size=vocab_size,
    )
    return Evaluation(
        model=str(model),
        against=str(against),
        protocol=protocol,
        **vars(summarize(positions, len(batch))),
        size=stored_size(candidate),
        base_size=stored_size(base),
        seconds=time.monotonic() - started,
        versions=_versions(),
    )


def compare_models(
    base: Checkpoint,
    candidate: Checkpoint,
    batch: Tensor,
    vocab_size: int,
    on_progress: OnProgress | None = None,
    device: torch.device = CPU,
) -> Positions:
    """Positions of token windows [W, S], all but the last of each: W * (S - 1) entries."""
    progress = on_progress or (lambda what, done, total: None)
    models = [
        StreamedModel(checkpoint, make_linear=_reference_linear, device=device) for checkpoint in (base, candidate)
    ]
    hidden = [
        model.hidden_states(batch, on_block=partial(progress, name))[:, :-1]
        for model, name in zip(models, ("base", "model"), strict=True)
    ]  # [W, S - 1, H] each
    rows = [states.flatten(0, 1) for states in hidden]
    targets = batch[:, 1:].flatten()
    parts = []
    for start in range(0, len(targets), LOGIT_ROWS):
        chunk = slice(start, start + LOGIT_ROWS)
        logits = [model.logits(states[chunk])[:, :vocab_size] for model, states in zip(models, rows, strict=True)]
        found = compare_logits(logits[0], logits[1], targets[chunk].to(device))
        parts.append(Positions(*(column.cpu() for column in found)))
        progress("logits", min(start + LOGIT_ROWS, len(targets)), len(targets))
    positions = Positions.concatenate(parts)
    broken = int((~positions.base_finite).sum())
    if broken:
        raise InputError(f"{base.source}: the base's logits are not finite at {broken} of {len(targets)} positions")
    return positions


def _reference_linear(name: str, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
    """Float32 arithmetic by definition of the scheme: inputs are rounded where it says that they are quantized."""
    return ReferenceLinear(weight, bias)


def _check_windows(windows: int, window_len: int) -> None:
    if windows < 1:
        raise UsageError(f"windows = {windows} must be at least 1")
    if window_len < 2:
        raise UsageError(f"window_len = {window_len} must be at least 2: the first token of a window is not scored")


def _check_lengths(base: Checkpoint, candidate: Checkpoint, window_len: int) -> None:
    for checkpoint in (base, candidate):
        longest = checkpoint.spec.max_position_embeddings
        if window_len > longest:
            raise UsageError(
                f"window_len = {window_len} must be at most {longest}, the context length of {checkpoint.source}"
            )


def _versions() -> dict[str, str]:
    import transformers

    from aphroquant import __version__

    return {
        "aphroquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
