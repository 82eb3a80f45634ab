"""Rules: which modules they match, what those get, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aphroquant
from aphroquant.calibration.data import DEFAULT_TEXTS
from aphroquant.checkpoint import open_checkpoint
from aphroquant.conversion.rules import ModuleRule, RuleBook, parse_rule
from aphroquant.errors import UsageError
from aphroquant.evaluation import evaluate
from aphroquant.models.spec import DecoderSpec, decoder_spec
from aphroquant.schemes import DenseScheme, FloatScheme, IntegerScheme, Scheme

Tiny = Callable[..., Path]
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 32, "calibration": DEFAULT_TEXTS / "calibration_chat.jsonl"}
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [0],
}


def spec() -> DecoderSpec:
    """Four layers, the first with an MLP, the others with two experts."""
    return decoder_spec(CONFIG)


def matched(match: str) -> set[str]:
    book = RuleBook([ModuleRule(match, bits=8)], spec())
    return {module.removeprefix("model.") for module in book.decided}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("layers.0.self_attn.q_proj", {"layers.0.self_attn.q_proj"}),
        ("layers[0].attention", {f"layers.0.self_attn.{name}_proj" for name in "qkvo"}),
        ("layers[0].mlp", {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        ("layers[1:2].down", {f"layers.1.mlp.experts.{number}.down_proj" for number in (0, 1)}),
        ("layers[-1].v", {"layers.3.self_attn.v_proj"}),
        ("layers[::3].k", {"layers.0.self_attn.k_proj", "layers.3.self_attn.k_proj"}),
        ("layers[2:].o_proj", {"layers.2.self_attn.o_proj", "layers.3.self_attn.o_proj"}),
        ("router", {f"layers.{layer}.mlp.gate" for layer in (1, 2, 3)}),
        ("lm_head", {"lm_head"}),
        ("embedding", {"embed_tokens"}),
        ("experts.0.up_proj", {f"layers.{layer}.mlp.experts.0.up_proj" for layer in (1, 2, 3)}),
    ],
)
def test_a_rule_matches_by_name_by_role_and_by_layer(match: str, expected: set[str]) -> None:
    assert matched(match) == expected


def test_experts_are_a_role_and_wildcards_reach_only_the_layers_of_blocks() -> None:
    assert len(matched("experts")) == 3 * 2 * 3
    assert matched("*") == {module.removeprefix("model.") for module in spec().modules()}
    assert matched("layers[:]") == matched("*")


def test_the_last_rule_that_matches_decides_alone() -> None:
    rules = [ModuleRule("mlp", bits=8), ModuleRule("layers[0]", group_size=32), ModuleRule("layers[0].down", keep=True)]
    book = RuleBook(rules, spec())
    assert book.rule("model.layers.1.mlp.experts.0.gate_proj") is rules[0]
    assert book.rule("model.layers.0.mlp.up_proj") is rules[1]
    assert book.rule("model.layers.0.mlp.down_proj") is rules[2]
    assert book.rule("model.layers.1.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("match", "hint"),
    [
        ("dwn_proj", "Did you mean 'down_proj'?"),
        ("atention", "Did you mean 'attention'?"),
        ("layers[0:2].donw", "Did you mean 'layers[0:2].down'?"),
        ("layers[7]", "the model has 4 layers"),
        ("layers[1:].upproj", "Did you mean 'layers[1:].up_proj'?"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_with_a_suggestion(match: str, hint: str) -> None:
    with pytest.raises(UsageError, match="matches no module") as caught:
        matched(match)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("down_proj: bits=8", ModuleRule("down_proj", bits=8)),
        ("layers[0:2]: keep", ModuleRule("layers[0:2]", keep=True)),
        ("v: scheme=w8a16, group-size = -1,asymmetric", ModuleRule("v", "w8a16", None, -1, False)),
        ("*.q_proj:solver=gptq,symmetric=yes", ModuleRule("*.q_proj", symmetric=True, solver="gptq")),
    ],
)
def test_a_line_is_a_rule_and_a_rule_is_a_line(text: str, expected: ModuleRule) -> None:
    assert parse_rule(text) == expected
    assert parse_rule(str(expected)) == expected
    assert ModuleRule(**expected.to_dict()) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("down_proj", "is no rule"),
        ("", "is no rule"),
        (": bits=4", "is no rule"),
        ("layers[0:2]", "is no rule"),
        ("down: bit=4", "'bit=4' sets nothing that is known"),
        ("down:", "'' sets nothing that is known"),
        ("down: bits=four", "bits = 'four' must be a whole number"),
        ("down: symmetric=maybe", "must be true or false"),
        ("down: bits=4, bits=3", "sets bits twice"),
        ("down: bits=9", "bits = 9 must be between 1 and 8"),
        ("down: group_size=0", "group_size = 0 must be positive"),
        ("down: keep, bits=4", "keeps modules dense, so that bits says nothing"),
        ("down: keep=false", "sets nothing"),
        ("layers[a]: bits=4", "is no range of layers"),
        ("layers[::0]: bits=4", "is no range of layers"),
        ("layers[]: bits=4", "is no range of layers"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert message in caught.value.message


def schemes_of(out: Path) -> dict[str, Scheme]:
    return {
        module.removeprefix("model.layers."): scheme
        for module, scheme in open_checkpoint(out).schemes().items()
        if not isinstance(scheme, DenseScheme)
    }


def converted(source: Path, out: Path, *rules: str | ModuleRule, **options: Any) -> Any:
    return aphroquant.convert(source, out=out, rules=rules, **{**QUICK, **options})


@pytest.mark.parametrize("to", ["gptq", "auto-round", "compressed-tensors", "hqq"])
def test_formats_that_hold_mixtures_read_back_what_rules_ask_for(
    tiny_checkpoint: Tiny, tmp_path: Path, to: str
) -> None:
    result = converted(
        tiny_checkpoint("llama"),
        tmp_path / "out",
        "down: bits=8, solver=rtn",
        "lm_head: bits=8",
        to=to,
        bits=4,
        group_size=32,
        symmetric=True,
    )
    found = schemes_of(tmp_path / "out")
    bits = {module: scheme.bits for module, scheme in found.items()}
    assert {module for module, width in bits.items() if width == 8} == {
        "0.mlp.down_proj",
        "1.mlp.down_proj",
        "lm_head",
    }
    assert result.num_modules == 15
    assert not result.warnings
    assert evaluate(tmp_path / "out", against=tiny_checkpoint("llama"), windows=2, window_len=32).mean_kld < 0.1


def test_settings_schemes_and_solvers_differ_and_training_moves_what_it_can(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    result = converted(
        tiny_checkpoint("llama"),
        tmp_path / "out",
        "mlp: bits=4, group_size=16, symmetric",
        "layers[0].down: scheme=fp8-dynamic",
        "layers[1].o: keep",
        "lm_head: scheme=fp8-dynamic",
        to="compressed-tensors",
        bits=8,
        group_size=32,
        solver="awq-gptq",
        refine_steps=4,
        distill_steps=8,
    )
    found = schemes_of(tmp_path / "out")
    assert found["0.self_attn.q_proj"] == IntegerScheme(8, 32, True)
    assert found["1.mlp.gate_proj"] == IntegerScheme(4, 16, True)
    assert isinstance(found["0.mlp.down_proj"], FloatScheme)
    assert "1.self_attn.o_proj" not in found
    assert isinstance(found["lm_head"], FloatScheme)
    assert result.modules["model.layers.0.mlp.up_proj"]["scheme"] == "int4 sym g16"
    assert result.scheme.startswith("int8 sym g32 (7), int4 sym g16 (5), ")
    record = json.loads((tmp_path / "out" / "aphroquant.json").read_text())
    assert record["request"]["rules"][1] == {"match": "layers[0].down", "scheme": "fp8-dynamic"}


def test_what_a_module_gets_does_not_depend_on_rules_for_those_behind_it(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, options = tiny_checkpoint("llama"), {"to": "gptq", "bits": 4, "group_size": 32, "solver": "gptq"}
    converted(source, tmp_path / "all", **options)
    converted(source, tmp_path / "some", "layers[1].down: bits=8", **options)
    one, other = (open_checkpoint(tmp_path / name) for name in ("all", "some"))
    for module in other.spec.modules()[:-1]:
        assert one.weight(module).same_values(other.weight(module)), module


def test_a_dry_run_tells_the_size_and_what_gets_what(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source, options = tiny_checkpoint("llama"), {"to": "gptq", "bits": 4, "group_size": 32}
    dry = converted(source, tmp_path / "out", "down: bits=8", dry_run=True, **options)
    assert not (tmp_path / "out").exists()
    assert dry.scheme == "int4 asym g32 (12), int8 asym g32 (2)"
    assert dry.num_bytes == converted(source, tmp_path / "out", "down: bits=8", **options).num_bytes


def test_gguf_types_follow_rules(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama")
    rules = ("down: scheme=q5_0", "layers[0].q: keep", "lm_head: bits=8", "embedding: scheme=q4_0")
    result = converted(source, tmp_path / "a.gguf", *rules, to="gguf", scheme="q4_1", calibration=())
    kinds = {module: report["type"] for module, report in result.modules.items()}
    assert kinds["model.layers.1.mlp.down_proj"] == "Q5_0"
    assert kinds["model.layers.0.self_attn.q_proj"] == "F32"
    assert (kinds["lm_head"], kinds["model.embed_tokens"]) == ("Q8_0", "Q4_0")
    assert kinds["model.layers.1.mlp.up_proj"] == "Q4_1"


def test_layers_that_engines_fuse_are_told_of_when_they_differ(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    result = converted(tiny_checkpoint("llama"), tmp_path / "out", "v: bits=8", to="gptq", bits=4, dry_run=True)
    assert len(result.warnings) == 1
    assert "self_attn.q_proj is int4 asym g64 and model.layers.0.self_attn.v_proj int8" in result.warnings[0]
    assert "(2 such groups)" in result.warnings[0]


@pytest.mark.parametrize(
    ("options", "rules", "message"),
    [
        ({"to": "awq"}, ["down: group_size=32"], "awq has one group size for all modules"),
        ({"to": "awq"}, ["down: bits=8"], "rule 'down: bits=8': awq holds 4 bits, not 8"),
        ({"to": "fp8"}, ["down: scheme=fp8-block"], "fp8 has one scheme for all modules"),
        ({"to": "hqq"}, ["layers[0]: bits=8"], "hqq has one scheme for every self_attn.q_proj"),
        ({"to": "gptq"}, ["down: group_size=48"], "rule 'down: group_size=48': model.layers.0.mlp.down_proj: in_feat"),
        ({"to": "gptq"}, ["embedding: bits=8"], "model.embed_tokens stays dense in gptq"),
        ({"to": "awq"}, ["lm_head: bits=4"], "readers of awq take lm_head for dense"),
        ({"to": "gptq"}, ["*: keep"], "nothing is left to quantize"),
        ({"to": "gptq"}, ["down: solver=magic"], "rule 'down: solver=magic': unknown solver"),
        ({"to": "gguf", "calibration": ()}, ["down: group_size=32"], "--group-size does not go with gguf"),
        ({"to": "gguf", "calibration": ()}, ["down: scheme=q9"], "rule 'down: scheme=q9': gguf has no scheme 'q9'"),
    ],
)
def test_what_a_target_cannot_mix_is_refused_before_any_work(
    tiny_checkpoint: Tiny, tmp_path: Path, options: dict[str, Any], rules: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        converted(tiny_checkpoint("llama"), tmp_path / "out", *rules, **options)
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_tied_head_has_nothing_to_quantize(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="lm_head has no weight of its own"):
        converted(source, tmp_path / "out", "lm_head: bits=8", to="gptq")
    with pytest.raises(UsageError, match="lm_head has no tensor in a GGUF file"):
        converted(source, tmp_path / "out", "lm_head: bits=8", to="gguf", calibration=())


def test_a_quantized_source_changes_by_rules_only_with_requantize(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    converted(tiny_checkpoint("llama"), tmp_path / "four", to="gptq", bits=4, solver="rtn", samples=0)
    with pytest.raises(UsageError, match="--rule asks for others"):
        converted(tmp_path / "four", tmp_path / "out", "down: bits=8", to="gptq")
