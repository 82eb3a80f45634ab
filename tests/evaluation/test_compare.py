"""Whole evaluations of tiny models, checked against transformers and against themselves."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.evaluation import Bounds, Evaluation, EvaluationRun, check_bounds, evaluate, evaluate_models
from aphroquant.evaluation.measure import measure
from aphroquant.evaluation.texts import calibrated_on, read_texts
from aphroquant.evaluation.windows import encode, token_windows

TinyCheckpoint = Callable[..., Path]
Copy = Callable[..., Path]
WINDOWS = {"windows": 3, "window_len": 64}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_against_itself_diverges_nowhere(family: str, tiny_checkpoint: TinyCheckpoint, text_file: Path) -> None:
    path = tiny_checkpoint(family)
    result = evaluate(path, against=path, texts=[text_file], **WINDOWS)
    assert result.mean_kld < 1e-6
    assert result.max_kld < 1e-6
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.base_perplexity
    assert result.log_ratio == 0
    assert result.non_finite_share == 0
    assert result.size == result.base_size
    assert result.bits_per_weight == pytest.approx(32, abs=0.1)
    assert result.size.linear_bits_per_weight == 32
    assert result.num_bytes == sum(info.nbytes for info in open_checkpoint(path).tensors.values())


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_figures_of_a_disturbed_model_equal_those_from_transformers(
    noise: float, tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_checkpoint("llama")
    model = noisy_copy(base, noise)
    result = evaluate(model, against=base, texts=[text_file], **WINDOWS)

    tokenizer = AutoTokenizer.from_pretrained(base)
    batch = token_windows(encode(tokenizer, text_file.read_text()), 3, 64)
    log_probabilities = []
    for path in (base, model):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(batch).logits
        log_probabilities.append(logits[:, :-1, : len(tokenizer)].double().log_softmax(-1))  # no padding columns
    log_p, log_q = log_probabilities
    kld = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    losses = [-part.gather(2, batch[:, 1:, None]).mean() for part in log_probabilities]
    assert result.protocol.vocab_size == len(tokenizer) < 384
    assert result.protocol.scored_tokens == 3 * 63
    assert result.mean_kld == pytest.approx(float(kld.mean()), rel=1e-4)
    assert result.max_kld == pytest.approx(float(kld.max()), rel=1e-3)
    assert result.base_perplexity == pytest.approx(math.exp(losses[0]), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(losses[1]), rel=1e-6)
    assert result.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_more_noise_diverges_more(tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path) -> None:
    base = tiny_checkpoint("qwen2")
    klds = [
        evaluate(noisy_copy(base, noise), against=base, texts=[text_file], **WINDOWS).mean_kld
        for noise in (0.01, 0.05, 0.2)
    ]
    assert klds == sorted(klds)
    assert klds[0] < 0.1 * klds[1] < klds[2]


def test_a_broken_weight_shows_as_infinite_and_not_as_nan(
    tiny_checkpoint: TinyCheckpoint, changed_copy: Copy, text_file: Path
) -> None:
    base = tiny_checkpoint("llama")
    broken = changed_copy(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(math.nan))
    result = evaluate(broken, against=base, texts=[text_file], **WINDOWS)
    assert result.non_finite_share == 1
    assert result.mean_kld == result.perplexity == math.inf
    assert result.top1_agreement == 0
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["mean_kld"] is None


def test_a_broken_base_is_an_error(tiny_checkpoint: TinyCheckpoint, changed_copy: Copy, text_file: Path) -> None:
    model = tiny_checkpoint("llama")
    broken = changed_copy(model, lambda tensors: tensors["model.norm.weight"].fill_(math.inf))
    with pytest.raises(InputError, match=r"the base's logits are not finite at 189 of 189 positions"):
        evaluate(model, against=broken, texts=[text_file], **WINDOWS)


def test_models_of_different_families_compare_if_they_share_tokens(
    tiny_checkpoint: TinyCheckpoint, text_file: Path
) -> None:
    result = evaluate(tiny_checkpoint("qwen3"), against=tiny_checkpoint("llama"), texts=[text_file], **WINDOWS)
    assert 0 < result.mean_kld < math.inf


def test_a_head_with_more_padding_compares_over_the_true_vocabulary(
    tiny_checkpoint: TinyCheckpoint, changed_copy: Copy, text_file: Path
) -> None:
    base = tiny_checkpoint("llama")

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat((tensors[name], torch.full((16, 64), 9.0)))

    padded = changed_copy(base, pad)
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    assert evaluate(padded, against=base, texts=[text_file], **WINDOWS).mean_kld < 1e-6


def test_a_different_tokenizer_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, text_file: Path) -> None:
    base = tiny_checkpoint("llama")
    model = tmp_path / "other"
    shutil.copytree(base, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="the vocabularies differ in 2 tokens"):
        evaluate(model, against=base, texts=[text_file], **WINDOWS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": 0}, "windows = 0 must be at least 1"),
        ({"window_len": 1}, "window_len = 1 must be at least 2"),
        ({"window_len": 513}, "window_len = 513 must be at most 512, the context length"),
    ],
)
def test_windows_that_cannot_be_are_refused(
    settings: dict[str, int], message: str, tiny_checkpoint: TinyCheckpoint, text_file: Path
) -> None:
    path = tiny_checkpoint("llama")
    with pytest.raises(UsageError, match=message):
        evaluate(path, against=path, texts=[text_file], **settings)


def test_a_text_too_short_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama")
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(InputError, match=r"the evaluation text has \d tokens, too few for one window of 64"):
        evaluate(path, against=path, texts=[tmp_path / "short.txt"], window_len=64)


def test_the_protocol_says_what_was_measured(tiny_checkpoint: TinyCheckpoint, text_file: Path) -> None:
    path = tiny_checkpoint("llama")
    result = evaluate(path, against=path, texts=[text_file], windows=1000, window_len=256, seed=3)
    protocol = result.to_dict()["protocol"]
    assert protocol["requested_windows"] == 1000
    assert protocol["windows"] == protocol["num_text_tokens"] // 256
    assert protocol["seed"] == 3
    assert protocol["texts"][0]["name"] == str(text_file)
    assert set(result.versions) == {"aphroquant", "torch", "transformers", "python"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.mean_kld = 0.0  # type: ignore[misc]


def test_progress_passes_through_every_stage(tiny_checkpoint: TinyCheckpoint) -> None:
    seen: list[tuple[str, int, int]] = []
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    batch = torch.randint(0, 300, (4, 128))
    measure(checkpoint, [checkpoint], batch, 360, lambda *news: seen.append(news))
    assert seen == [
        ("base", 1, 2), ("base", 2, 2), ("model", 1, 2), ("model", 2, 2), ("logits", 256, 508), ("logits", 508, 508),
    ]  # fmt: skip


def test_quantized_activations_count(tiny_checkpoint: TinyCheckpoint, text_file: Path, tmp_path: Path) -> None:
    """The same FP8 weights with float inputs diverge less than with FP8 inputs."""
    from aphroquant.conversion import convert

    base = tiny_checkpoint("llama")
    convert(base, to="fp8", out=tmp_path / "fp8")
    quantized = open_checkpoint(tmp_path / "fp8")
    weights_alone = tmp_path / "weights"
    shutil.copytree(base, weights_alone)
    tensors = load_file(base / "model.safetensors")
    for module in quantized.spec.modules():
        tensors[f"{module}.weight"] = quantized.weight(module).dequantize()
    save_file(tensors, weights_alone / "model.safetensors", metadata={"format": "pt"})
    klds = [
        evaluate(path, against=base, texts=[text_file], **WINDOWS).mean_kld
        for path in (weights_alone, tmp_path / "fp8")
    ]
    assert 0 < 1.2 * klds[0] < klds[1]


def test_the_bundled_text_is_the_default(tiny_checkpoint: TinyCheckpoint) -> None:
    path = tiny_checkpoint("llama")
    protocol = evaluate(path, against=path, windows=2, window_len=128).protocol
    assert protocol.texts[0].name == "default"
    assert protocol.num_text_tokens > 8 * 1024


def test_each_text_has_its_own_figures_and_the_whole_has_those_of_all(
    tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint("llama")
    model = noisy_copy(base, 0.1)
    other = tmp_path / "other.txt"
    other.write_text("A quick fox; a lazy dog; a capital of France. " * 30)
    both = evaluate(model, against=base, texts=[text_file, other], **WINDOWS)
    alone = [evaluate(model, against=base, texts=[text], **WINDOWS) for text in (text_file, other)]
    assert [part.text.name for part in both.texts] == [str(text_file), str(other)]
    for part, single in zip(both.texts, alone, strict=True):
        assert part.mean_kld == pytest.approx(single.mean_kld)
        assert part.perplexity == pytest.approx(single.perplexity)
        assert part.windows == single.protocol.windows
    counts = [part.scored_tokens for part in both.texts]
    mean = sum(part.mean_kld * count for part, count in zip(both.texts, counts, strict=True)) / sum(counts)
    assert both.mean_kld == pytest.approx(mean)
    assert both.protocol.scored_tokens == sum(counts)


def test_several_models_have_the_figures_that_each_has_alone(
    tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path
) -> None:
    base = tiny_checkpoint("llama")
    models = [noisy_copy(base, noise) for noise in (0.02, 0.2)]
    run = evaluate_models(models, against=base, texts=[text_file], **WINDOWS)
    for model, found in zip(models, run.evaluations, strict=True):
        alone = evaluate(model, against=base, texts=[text_file], **WINDOWS)
        assert found.mean_kld == pytest.approx(alone.mean_kld)
        assert found.model == str(model)
    (comparison,) = run.comparisons
    assert comparison.better == str(models[0])
    assert comparison.kld.mean == pytest.approx(run.evaluations[0].mean_kld - run.evaluations[1].mean_kld)
    with pytest.raises(UsageError, match="is given twice"):
        evaluate_models([base, base], against=base, texts=[text_file], **WINDOWS)


def test_the_noise_floor_is_that_of_bfloat16_in_transformers(
    tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path, tmp_path: Path
) -> None:
    """Weights that bfloat16 holds, computed by transformers in bfloat16 and in float32: the same size of difference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_checkpoint("llama", torch_dtype="bfloat16")
    result = evaluate(base, against=base, texts=[text_file], windows=2, window_len=256, with_floor=True)
    floor = result.noise_floor
    assert floor is not None
    assert result.mean_kld < 1e-8 < floor.mean_kld < floor.p99_kld
    batch = token_windows(encode(AutoTokenizer.from_pretrained(base), text_file.read_text()), 2, 256)
    logs = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            states = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).model(batch).last_hidden_state
        head = load_file(base / "model.safetensors")["lm_head.weight"].float()
        logs.append((states.float() @ head.T)[:, :-1, : result.protocol.vocab_size].double().log_softmax(-1))
    kld = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert floor.mean_kld == pytest.approx(float(kld.mean()), rel=0.5)


def test_a_bound_below_the_noise_floor_is_noted(tiny_checkpoint: TinyCheckpoint, text_file: Path) -> None:
    base = tiny_checkpoint("llama")
    result = evaluate(base, against=base, texts=[text_file], with_floor=True, **WINDOWS)
    notes = {check.name: check.note for check in check_bounds(result, Bounds(max_kld=1e-9, max_p99_kld=10))}
    assert notes["max_kld"] is not None
    assert "noise floor" in notes["max_kld"]
    assert notes["max_p99_kld"] is None


def test_a_text_that_the_model_was_calibrated_on_is_refused(
    tiny_checkpoint: TinyCheckpoint, text_file: Path, tmp_path: Path
) -> None:
    from aphroquant.conversion import convert

    base = tiny_checkpoint("llama")
    text = tmp_path / "calibration.txt"
    text.write_text(text_file.read_text() * 2)
    convert(base, to="gptq", out=tmp_path / "out", calibration=[text], samples=2, seq_len=64, group_size=32)
    with pytest.raises(UsageError, match=r"was calibrated on .*calibration.txt, as its aphroquant.json says"):
        evaluate(tmp_path / "out", against=base, texts=[text], **WINDOWS)
    allowed = evaluate(tmp_path / "out", against=base, texts=[text], allow_calibration_text=True, **WINDOWS)
    assert allowed.calibrated_on == (str(text),)
    assert evaluate(tmp_path / "out", against=base, texts=[text_file], **WINDOWS).calibrated_on == ()


@pytest.mark.parametrize("record", ["[]", '{"calibration": 3}', '{"calibration": {"sources": [5]}}', "{", "\x80"])
def test_a_record_that_is_not_ours_says_nothing_of_calibration(
    record: str, tiny_checkpoint: TinyCheckpoint, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), model)
    (model / "aphroquant.json").write_text(record, encoding="latin-1")
    assert calibrated_on(open_checkpoint(model), read_texts([text_file])) == ()


def test_the_worst_tokens_are_in_their_context_with_both_models_guesses(
    tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, text_file: Path
) -> None:
    base = tiny_checkpoint("llama")
    result = evaluate(noisy_copy(base, 0.2), against=base, texts=[text_file], **WINDOWS)
    klds = [worst.kld for worst in result.worst]
    assert klds == sorted(klds, reverse=True)
    assert klds[0] == result.max_kld
    text = text_file.read_text()
    for worst in result.worst:
        assert worst.before + worst.token + worst.after in text
        for top in (worst.base_top, worst.model_top):
            probabilities = [guess.probability for guess in top]
            assert probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) <= 1 + 1e-9
        guesses = {guess.text: guess.probability for guess in worst.base_top}
        if worst.token in guesses:
            assert guesses[worst.token] == pytest.approx(worst.base_probability)


def test_plain_values_give_the_run_back(
    tiny_checkpoint: TinyCheckpoint, noisy_copy: Copy, changed_copy: Copy, text_file: Path
) -> None:
    base = tiny_checkpoint("llama")
    broken = changed_copy(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(math.nan))
    run = evaluate_models([noisy_copy(base, 0.1), broken], against=base, texts=[text_file], **WINDOWS)
    plain = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    restored = EvaluationRun.from_dict(plain)
    assert restored.to_dict() == plain
    assert restored.evaluations[0] == run.evaluations[0]
    assert restored.evaluations[1].mean_kld == restored.evaluations[1].worst[0].kld == math.inf
    assert EvaluationRun.from_dict(run.evaluations[0].to_dict()).evaluations == run.evaluations[:1]


def test_a_record_of_an_earlier_version_is_read_and_a_damaged_one_is_told(
    tiny_checkpoint: TinyCheckpoint, text_file: Path
) -> None:
    path = tiny_checkpoint("llama")
    record = evaluate(path, against=path, texts=[text_file], **WINDOWS).to_dict()
    added = ("texts", "noise_floor", "worst", "histogram", "entropy_buckets", "mean_kld_interval", "drift", "tasks")
    earlier = {key: value for key, value in record.items() if key not in added}
    assert Evaluation.from_dict(earlier | {"gate": [], "unknown": 1}).mean_kld == record["mean_kld"]
    with pytest.raises(InputError, match=r"evaluation.protocol.windows = 'x' must be of type int"):
        Evaluation.from_dict(record | {"protocol": record["protocol"] | {"windows": "x"}})
    with pytest.raises(InputError, match=r"evaluation.mean_kld is missing"):
        Evaluation.from_dict({key: value for key, value in record.items() if key != "mean_kld"})
