"""lm-evaluation-harness on a checkpoint: the adapter against direct computation, and a small task of our own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'aphroquant[tasks]'")

from aphroquant.checkpoint import open_checkpoint
from aphroquant.cli import run
from aphroquant.errors import UsageError
from aphroquant.evaluation import TaskSettings, harness, measure_tasks
from aphroquant.evaluation.harness import CheckpointLM

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and its libraries are not ours

TinyCheckpoint = Callable[..., Path]
Copy = Callable[..., Path]

_CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
_ANSWER = """\
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
_QUESTIONS = ("What is the capital", "The quick brown", "2 + 2 made", "Hello! How are you", "weights are stored")
_CHOICES = (" of France", " fox", " 4;", " today?", " in groups")


@pytest.fixture
def adapter(tiny_checkpoint: TinyCheckpoint) -> CheckpointLM:
    return CheckpointLM(open_checkpoint(tiny_checkpoint("llama")), device="cpu")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two tasks whose data lies beside them; nothing is fetched or left in a cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, data = tmp_path / "tasks", tmp_path / "data.jsonl"
    folder.mkdir()
    records = [
        {"question": question, "choices": list(_CHOICES), "answer": i, "text": _CHOICES[i].strip()}
        for i, question in enumerate(_QUESTIONS)
    ]
    data.write_text("\n".join(map(json.dumps, records)))
    (folder / "choice.yaml").write_text(_CHOICE.format(data=data))
    (folder / "answer.yaml").write_text(_ANSWER.format(data=data))
    return folder


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def logprob(path: Path, tokens: list[int], first: int) -> float:
    """Of the tokens from `first` on, by transformers."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    rows = logits[first - 1 : -1].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(tokens[first:])[:, None]).sum())


def test_likelihoods_are_those_of_transformers(adapter: CheckpointLM, tiny_checkpoint: TinyCheckpoint) -> None:
    found = adapter.loglikelihood(requests(("The quick brown", " fox jumps"), ("", "Hello")), disable_tqdm=True)
    context, whole = adapter.tok_encode("The quick brown"), adapter.tok_encode("The quick brown fox jumps")
    assert found[0][0] == pytest.approx(logprob(tiny_checkpoint("llama"), whole, len(context)), rel=1e-4)
    alone = [adapter.prefix_token_id, *adapter.tok_encode("Hello")]
    assert found[1][0] == pytest.approx(logprob(tiny_checkpoint("llama"), alone, 1), rel=1e-4)


def test_rolling_likelihood_predicts_every_token_once(adapter: CheckpointLM, tiny_checkpoint: TinyCheckpoint) -> None:
    text = "A model is quantized, measured, and then it answers questions. "
    tokens = [adapter.prefix_token_id, *adapter.tok_encode(text)]
    (found,) = adapter.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    assert found == pytest.approx(logprob(tiny_checkpoint("llama"), tokens, 1), rel=1e-4)
    long = text * 40  # longer than the context of 512
    assert len(adapter.tok_encode(long)) > 600
    assert adapter.loglikelihood_rolling(requests((long,)), disable_tqdm=True)[0] < 5 * found


def test_generated_text_is_greedy_and_ends_before_a_stop_string(
    adapter: CheckpointLM, tiny_checkpoint: TinyCheckpoint
) -> None:
    from transformers import AutoModelForCausalLM

    prompt = adapter.tok_encode("The quick brown fox")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.float32)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    whole = adapter.tokenizer.decode(tokens, skip_special_tokens=True)
    stop = whole[len(whole) // 2]
    found = adapter.generate_until(
        requests(
            ("The quick brown fox", {"until": [], "max_gen_toks": 8}),
            ("The quick brown fox", {"until": [stop, ""], "max_gen_toks": 8, "do_sample": False}),
        )
    )
    assert found == [whole, whole[: whole.index(stop)]]


def test_a_task_is_run_on_candidate_and_base(tasks: Path, tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy) -> None:
    base = tiny_checkpoint("llama")
    settings = TaskSettings(("tiny_choice", "tiny_answer"), path=tasks)
    same, noisy = measure_tasks([base, noisy_copy(base, 0.5)], against=base, settings=settings, device="cpu")
    assert [(score.task, score.metric) for score in same.scores] == [
        ("tiny_answer", "exact_match"), ("tiny_choice", "acc"),
    ]  # fmt: skip
    for score in same.scores:
        assert score.value == score.base_value
        assert score.num_samples == 5
        assert score.higher_is_better is True
    adapter = CheckpointLM(open_checkpoint(base), device="cpu")
    hits = 0
    for i, question in enumerate(_QUESTIONS):
        likely = adapter.loglikelihood(requests(*((question, choice) for choice in _CHOICES)), disable_tqdm=True)
        hits += max(range(5), key=lambda k: likely[k][0]) == i
    assert same.scores[1].value == pytest.approx(hits / 5)
    assert noisy.scores[1].base_value == same.scores[1].value
    assert noisy.harness.startswith("lm-evaluation-harness 0.")


def test_the_command_line_runs_tasks_and_records_them(
    tasks: Path, tiny_checkpoint: TinyCheckpoint, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, path, page = str(tiny_checkpoint("llama")), tmp_path / "figures.json", tmp_path / "report.html"
    small = ["--text", str(text_file), "--windows", "2", "--window-len", "64"]
    options = ["--tasks", "tiny_choice", "--task-path", str(tasks), "--task-limit", "3", "--fewshot", "1"]
    assert run(["eval", base, "--against", base, *small, *options, "--json", str(path), "--html", str(page)]) == 0
    assert "tiny_choice acc" in capsys.readouterr().out
    (score,) = json.loads(path.read_text())["tasks"]["scores"]
    assert (score["num_samples"], score["num_fewshot"]) == (3, 1)
    assert math.isfinite(score["value"])
    assert "Tasks of lm-evaluation-harness" in page.read_text(encoding="utf-8")


def test_an_unknown_task_is_told_before_any_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(all_tasks=["arc_challenge", "arc_easy"])  # reading the harness's thousands takes long
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: known)
    with pytest.raises(UsageError, match="there is no task 'arc_easi'") as caught:
        measure_tasks([tmp_path / "none"], against=tmp_path / "none", settings=TaskSettings(("arc_easi",)))
    assert caught.value.hint == "did you mean 'arc_easy'?"
