"""Log-probabilities of continuations against transformers, one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.evaluation import scoring
from aphroquant.evaluation.scoring import ContinuationScorer, Request

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def requests() -> list[Request]:
    """Contexts and continuations of many lengths, some with the same input."""
    lengths = [(1, 1), (5, 3), (31, 1), (32, 1), (33, 40), (60, 5), (200, 1)]
    made = [Request(torch.randint(0, 300, (a,)).tolist(), torch.randint(0, 300, (b,)).tolist()) for a, b in lengths]
    return [*made, *(Request(made[6].context, [token]) for token in range(4)), Request([7, 8], [])]


def expected(path: Path, request: Request) -> tuple[float, bool]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*request.context, *request.continuation]])).logits[0].double()
    rows = logits[len(request.context) - 1 : -1].log_softmax(-1)
    targets = torch.tensor(request.continuation)
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_are_those_of_transformers_whatever_is_scored_beside_them(
    family: str, tiny_checkpoint: TinyCheckpoint, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(family)
    scorer = ContinuationScorer(open_checkpoint(path))
    together = scorer.score(requests)
    for request, score in zip(requests[:-1], together, strict=False):
        logprob, is_greedy = expected(path, request)
        assert score.logprob == pytest.approx(logprob, rel=1e-4)
        assert score.is_greedy == is_greedy
    assert together[-1] == (0.0, True)  # nothing to continue with is certain
    monkeypatch.setattr(scoring, "PORTION_TOKENS", 64)
    monkeypatch.setattr(scoring, "LOGIT_ROWS", 7)
    seen: list[tuple[int, int]] = []
    in_portions = scorer.score(requests, lambda done, total: seen.append((done, total)))
    assert [score.logprob for score in in_portions] == pytest.approx([score.logprob for score in together], rel=1e-4)
    assert seen[-1] == (len(requests), len(requests))
    assert len(seen) > 2


def test_what_greedy_decoding_writes_is_greedy(tiny_checkpoint: TinyCheckpoint) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    scorer = ContinuationScorer(open_checkpoint(path))
    right, wrong = scorer.score(
        [Request([5, 6, 7], answer), Request([5, 6, 7], [*answer[:-1], (answer[-1] + 1) % 300])]
    )
    assert right.is_greedy
    assert not wrong.is_greedy
    assert right.logprob > wrong.logprob


def test_a_context_too_long_loses_its_beginning(tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint("llama")
    scorer = ContinuationScorer(open_checkpoint(path))
    tokens = torch.randint(0, 300, (700,)).tolist()
    long, short = scorer.score([Request(tokens, [1, 2]), Request(tokens[-511:], [1, 2])])
    assert scorer.max_length == 512
    assert long.logprob == pytest.approx(short.logprob)
    (whole,) = scorer.score([Request([3], tokens)])
    assert whole.logprob < 0
