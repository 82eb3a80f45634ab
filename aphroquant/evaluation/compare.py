"""evaluate(): checkpoints, the same token windows, the same arithmetic, every figure from one pass."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.devices import torch_device
from aphroquant.errors import UsageError
from aphroquant.evaluation.measure import OnProgress, measure
from aphroquant.evaluation.noise import NoiseFloor, noise_floor
from aphroquant.evaluation.pairs import compare_pair
from aphroquant.evaluation.positions import Positions
from aphroquant.evaluation.result import Evaluation, EvaluationRun, Protocol, TextFigures
from aphroquant.evaluation.size import StoredSize, stored_size
from aphroquant.evaluation.summary import summarize
from aphroquant.evaluation.texts import EvaluationText, TextSource, calibrated_on, read_texts, refuse_calibration_texts
from aphroquant.evaluation.windows import check_same_tokens, encode, token_windows
from aphroquant.evaluation.worst import WorstRows, describe_worst

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    with_floor: bool = False,
    allow_calibration_text: bool = False,
) -> Evaluation:
    """Measure `model` against its base on the same `windows` of `window_len` tokens of each text, in float32.

    Weights count as they dequantize, and inputs of linears are rounded where a scheme quantizes activations.
    `texts` are paths of UTF-8 files; without them a bundled text is used that calibration never sees. Windows are
    evenly spaced over a text, or drawn with `seed`. `device` is "auto" (a GPU if there is one), "cpu" or "cuda".
    `with_floor` also measures the noise floor, by an eighth more work on the base at the default windows.
    Raises UsageError if the two do not share their tokens, and if the model was calibrated on one of the texts.
    """
    run = evaluate_models(
        [model],
        against=against,
        texts=texts,
        windows=windows,
        window_len=window_len,
        seed=seed,
        device=device,
        on_progress=on_progress,
        with_floor=with_floor,
        allow_calibration_text=allow_calibration_text,
    )
    return run.evaluations[0]


def evaluate_models(
    models: Sequence[str | Path],
    *,
    against: str | Path,
    texts: Sequence[str | Path] | str | Path | None = None,
    windows: int = 8,
    window_len: int = 1024,
    seed: int | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
    with_floor: bool = True,
    allow_calibration_text: bool = False,
) -> EvaluationRun:
    """The same for several models of one base, on the same positions; the base computes only once.

    Every pair of models is compared position by position.
    """
    started = time.monotonic()
    _check_windows(windows, window_len)
    computes_on = torch_device(device)
    base, candidates = open_checkpoint(against), [open_checkpoint(model) for model in models]
    _check_candidates(base, candidates, window_len)
    contents = read_texts(texts)
    if not allow_calibration_text:
        for candidate in candidates:
            refuse_calibration_texts(candidate, contents)
    tokenizer = _shared_tokenizer(base, candidates, contents)
    parts = [_windows(text, tokenizer, windows, window_len, seed) for text in contents]
    known = max(tokenizer.get_vocab().values()) + 1
    vocab_size = min(known, *(checkpoint.spec.vocab_size for checkpoint in (base, *candidates)))
    protocol = _protocol(parts, vocab_size, windows, window_len, seed)
    batch = torch.cat([part.windows for part in parts])
    measured = measure(base, candidates, batch, vocab_size, on_progress, device=computes_on, with_floor=with_floor)
    floor = None if measured.floor is None else noise_floor(measured.floor, measured.floor_windows)
    shared = _Shared(str(against), stored_size(base), protocol, parts, batch, floor, tokenizer, started)
    evaluations = [
        _evaluation(str(model), candidate, positions, worst, calibrated_on(candidate, contents), shared)
        for model, candidate, positions, worst in zip(
            models, candidates, measured.positions, measured.worst, strict=True
        )
    ]
    comparisons = [
        compare_pair((str(models[i]), str(models[j])), measured.positions[i], measured.positions[j], len(batch), floor)
        for i, j in itertools.combinations(range(len(models)), 2)
    ]
    return EvaluationRun(tuple(evaluations), tuple(comparisons))


class _TextWindows(NamedTuple):
    """The windows [W, S] of one text."""

    source: TextSource
    windows: Tensor
    num_tokens: int

    @property
    def num_positions(self) -> int:
        return len(self.windows) * (self.windows.shape[1] - 1)


class _Shared(NamedTuple):
    """What the evaluations of one run have in common."""

    against: str
    base_size: StoredSize
    protocol: Protocol
    parts: Sequence[_TextWindows]
    batch: Tensor
    floor: NoiseFloor | None
    tokenizer: PreTrainedTokenizerBase
    started: float


def _evaluation(
    model: str,
    candidate: Checkpoint,
    positions: Positions,
    worst: WorstRows,
    calibrated_on: tuple[str, ...],
    shared: _Shared,
) -> Evaluation:
    return Evaluation(
        model=model,
        against=shared.against,
        protocol=shared.protocol,
        **vars(summarize(positions, len(shared.batch))),
        size=stored_size(candidate),
        base_size=shared.base_size,
        seconds=time.monotonic() - shared.started,
        versions=_versions(),
        texts=_text_figures(shared.parts, positions),
        noise_floor=shared.floor,
        worst=describe_worst(worst, positions, shared.batch, shared.tokenizer),
        calibrated_on=calibrated_on,
    )


def _windows(
    text: EvaluationText, tokenizer: PreTrainedTokenizerBase, windows: int, window_len: int, seed: int | None
) -> _TextWindows:
    token_ids = encode(tokenizer, text.content)
    return _TextWindows(
        text.source, token_windows(token_ids, windows, window_len, seed, text.source.name), len(token_ids)
    )


def _text_figures(parts: Sequence[_TextWindows], positions: Positions) -> tuple[TextFigures, ...]:
    """The figures of each text, whose positions stand one after the other."""
    ends = list(itertools.accumulate(part.num_positions for part in parts))
    return tuple(
        TextFigures(
            **vars(summarize(positions.select(slice(end - part.num_positions, end)), len(part.windows))),
            text=part.source,
            num_text_tokens=part.num_tokens,
            windows=len(part.windows),
            scored_tokens=part.num_positions,
        )
        for part, end in zip(parts, ends, strict=True)
    )


def _protocol(
    parts: Sequence[_TextWindows], vocab_size: int, windows: int, window_len: int, seed: int | None
) -> Protocol:
    return Protocol(
        texts=tuple(part.source for part in parts),
        num_text_tokens=sum(part.num_tokens for part in parts),
        windows=sum(len(part.windows) for part in parts),
        requested_windows=windows,
        window_len=window_len,
        scored_tokens=sum(part.num_positions for part in parts),
        seed=seed,
        vocab_size=vocab_size,
    )


def _check_windows(windows: int, window_len: int) -> None:
    if windows < 1:
        raise UsageError(f"windows = {windows} must be at least 1")
    if window_len < 2:
        raise UsageError(f"window_len = {window_len} must be at least 2: the first token of a window is not scored")


def _check_candidates(base: Checkpoint, candidates: Sequence[Checkpoint], window_len: int) -> None:
    if not candidates:
        raise UsageError("there is no model to evaluate")
    sources = [candidate.source for candidate in candidates]
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is given twice; a model is compared with others")
    for checkpoint in (base, *candidates):
        longest = checkpoint.spec.max_position_embeddings
        if window_len > longest:
            raise UsageError(
                f"window_len = {window_len} must be at most {longest}, the context length of {checkpoint.source}"
            )


def _shared_tokenizer(
    base: Checkpoint, candidates: Sequence[Checkpoint], texts: Sequence[EvaluationText]
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, once it is certain that all candidates split the texts as it does."""
    ours = base.tokenizer()
    for candidate in candidates:
        theirs = candidate.tokenizer()
        for text in texts:
            check_same_tokens(ours, theirs, text.content, (base.source, candidate.source))
    return ours


def _versions() -> dict[str, str]:
    import transformers

    from aphroquant import __version__

    return {
        "aphroquant": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
