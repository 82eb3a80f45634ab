"""Recipes and requests: the flags of `convert` are a small recipe, and shipped recipes can be made."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aphroquant.cli import run
from aphroquant.conversion.arguments import make_request
from aphroquant.conversion.run import convert_all
from aphroquant.errors import UsageError
from aphroquant.recipes.loading import load_recipe, read_recipe, shipped_names
from aphroquant.recipes.printing import recipe_text, with_source
from aphroquant.recipes.requests import requests_of

Tiny = Callable[..., Path]
FLAGS: list[dict[str, Any]] = [
    {"to": "compressed-tensors", "bits": 4.0, "group_size": 32},
    {"to": "gguf", "size": 2**31},
    {"to": "awq"},
    {"to": "gptq", "bits": 3, "group_size": 32, "symmetric": False, "solver": "gptq", "seed": 7, "samples": 3},
    {"to": "compressed-tensors", "rules": ["down: bits=8", "layers[0:2]: keep", "v: symmetric=false"]},
    {"to": "fp8", "scheme": "fp8-static", "calibration": ["a.txt", "b b.jsonl"], "weights": [3, 0.5]},
    {"to": "gguf", "scheme": "q4_k_m", "calibration": "default", "packing": "documents", "chat_template": "none"},
    {"to": "hqq", "samples": 0, "solver": "rtn", "ignore": ["o_proj", "*.v_proj"], "overwrite": True},
    {
        "to": "awq",
        "effort": "best",
        "refine_steps": 0,
        "device": "cpu",
        "requantize": True,
        "seq_len": 9,
        "rotate": True,
    },
]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_printed_recipe_of_a_request_means_that_request(flags: dict[str, Any]) -> None:
    request = make_request("org/model", out="dir/some model.v1", **flags)
    recipe = load_recipe(recipe_text(request))
    (name,) = recipe.outputs
    assert requests_of(recipe, {name: Path(recipe.outputs[name].out or "")}, Path()) == {name: request}


def test_paths_are_relative_to_the_recipes_directory(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    text = "source: model\ncalibration: {sources: [{path: a.txt}, {path: default}]}\noutputs: {a: {to: awq}}\n"
    request = requests_of(load_recipe(text), {"a": Path("x")}, tmp_path)["a"]
    assert request.source == str(tmp_path / "model")
    assert request.calibration == (tmp_path / "a.txt", Path("default"))


def test_an_impossible_output_is_named() -> None:
    wrong = {"to: awk": "outputs.a: unknown format 'awk'", "to: awq, group_size: 0": "outputs.a: group"}
    for line, message in wrong.items():
        recipe = load_recipe(f"source: m\noutputs: {{a: {{{line}}}}}")
        with pytest.raises(UsageError, match=message):
            requests_of(recipe, {"a": Path("x")}, None)


def test_outputs_of_one_pass_take_the_most_text_that_an_effort_asks_for() -> None:
    outputs = "{a: {to: awq, effort: fast}, b: {to: gptq}, c: {to: fp8, calibrates: false}}"
    recipe = load_recipe(f"source: m\noutputs: {outputs}")
    requests = requests_of(recipe, {name: Path(name) for name in "abc"}, None)
    assert [request.samples for request in requests.values()] == [128, 128, 0]


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_recipe_converts(tiny_checkpoint: Tiny, tmp_path: Path, name: str) -> None:
    source = tiny_checkpoint("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    recipe = read_recipe(name).recipe
    small = recipe.calibration.model_copy(update={"samples": 2, "seq_len": 32})
    quick = {key: output.model_copy(update=_few_steps(output)) for key, output in recipe.outputs.items()}
    recipe = recipe.model_copy(update={"source": str(source), "calibration": small, "outputs": quick})
    places = {key: tmp_path / f"{key}{'.gguf' if output.to == 'gguf' else ''}" for key, output in quick.items()}
    results = convert_all(list(requests_of(recipe, places, None).values()))
    assert all(Path(result.out).exists() for result in results)


def _few_steps(output: Any) -> dict[str, int]:
    return {"refine_steps": 1, "distill_steps": 1} if output.effort == "best" else {}


def test_convert_and_its_printed_recipe_write_the_same_bytes(
    tiny_checkpoint: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tiny_checkpoint("llama"), tmp_path / "out"
    flags = f"--to gptq --group-size 32 --samples 4 --seq-len 32 --calibration default --out {shlex.quote(str(out))}"
    arguments = ["convert", str(source), *shlex.split(flags)]
    assert run([*arguments, "--print-recipe"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert not out.exists()
    assert run(arguments) == 0
    first = (out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes()
    out.rename(tmp_path / "before")
    assert run(["pipeline", "run", str(recipe), "--job", str(tmp_path / "job")]) == 0
    assert first == ((out / "model.safetensors").read_bytes(), (out / "config.json").read_bytes())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--to gptq --kv-scales", "--kv-scales: readers of gptq look for no scales"),
        ("--to fp8 --kv-scales --samples 0", "--kv-scales needs calibration"),
        ("--to awq --bits 3", "awq holds 4 bits, not 3"),
        ("--to gguf --scheme q9", "gguf has no scheme 'q9'"),
        ("--to gptq --samples 0 --solver gptq", "solver gptq needs calibration, but samples = 0"),
    ],
)
def test_no_recipe_is_printed_that_could_not_be_carried_out(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", "source", *flags.split(), "--out", "out", "--print-recipe"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_recipe_that_no_source_could_make_possible_is_not_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("source: org/model\noutputs: {a: {to: fp8, calibrates: false, kv_scales: true}}\n")
    assert run(["recipe", "validate", str(recipe)]) == 2
    assert "outputs.a: --kv-scales needs calibration" in capsys.readouterr().err


def test_a_recipe_gets_a_source_in_place_of_its_own() -> None:
    text = "# why\nsource: a\noutputs: {a: {to: awq}}\n"
    assert load_recipe(with_source(text, "org/b: #c")).source == "org/b: #c"
    assert with_source(text, "b").startswith("# why\nsource:")
