"""From YAML to a recipe: what is wrong is said with file, line and key, and nothing is taken for what it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aphroquant.errors import InputError
from aphroquant.recipes.loading import MAX_NODES, load_recipe, read_recipe, shipped_names
from aphroquant.recipes.printing import SCHEMA, schema_text

SMALL = "outputs:\n  awq:\n    to: awq\n"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("output:\n  awq: {to: awq}\n", "line 1: unknown key 'output'", "Did you mean 'outputs'?"),
        (SMALL + "    bit: 4\n", "line 4: unknown key 'outputs.awq.bit'", "Did you mean 'bits'?"),
        (SMALL + "    bits: four\n", 'line 4: outputs.awq.bits = "four": input should be a valid', None),
        (SMALL + "    bits: 9\n", "line 4: outputs.awq.bits: must be between 1 and 8", None),
        (SMALL + "    rules:\n      - {module: v, bits: 8}\n", "unknown key 'outputs.awq.rules[0].module'", "modules"),
        (SMALL + "gates:\n  max_kld: .nan\n", "line 5: gates.max_kld", None),
        (SMALL + "gates:\n  texts:\n    wiki: {max_kld: 1}\n", "gates name the text 'wiki', which is not", None),
        (SMALL + "publish:\n  - {to: x, outputs: [gptq]}\n", "publish names the output 'gptq'", None),
        (SMALL + "evaluation: null\ngates: {max_kld: 1}\n", "gates need an evaluation", None),
        (SMALL + "calibration:\n  sources: [{path: a, weight: 1}, {path: b}]\n", "line 4: calibration: sources", None),
        (SMALL + "calibration:\n  sources: [{path: a, weight: 0}]\n", "greater than 0", None),
        (SMALL + SMALL, "line 4: outputs is given twice", None),
        (SMALL + "  awq/x: {to: awq}\n", "is no name for an output", None),
        ("outputs: {}\n", "line 1: outputs: dictionary should have at least 1 item", None),
        ("- a\n", "a recipe is a mapping of keys, not a list", None),
        ("", "a recipe is a mapping of keys, not empty", None),
        ("a: [1\n", "line 2", None),
        ("a: !!python/object/apply:os.system ['true']\n", "could not determine a constructor", None),
        ("a: &a [*a]\n", "nested too deeply", None),
        ("[" * 3000, "", None),
        (SMALL + "publish:\n  - {to: \"a\\0b\"}\n", "line 5: publish[0].to: has a zero byte", None),
        (SMALL + "    out: " + "x" * 256 + "\n", "line 4: outputs.awq.out: is too long", None),
        (SMALL + "evaluation: {texts: {wiki: " + "x/" * 2001 + "}}\n", "evaluation.texts.wiki: is too long", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_line_and_key(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(text, "r.yaml")
    assert caught.value.message.startswith("r.yaml")
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_aliases_that_stand_for_millions_of_values_are_refused_at_once() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(InputError, match=f"more than {MAX_NODES:,} values"):
        load_recipe("\n".join(["a0: &a0 [x, x]", *levels]))


def test_words_stay_words_and_exponents_are_numbers() -> None:
    recipe = load_recipe("name: no\ndescription: 2024-01-01\n" + SMALL + "gates: {max_kld: 1e-3}\n")
    assert (recipe.name, recipe.description, recipe.gates.max_kld) == ("no", "2024-01-01", 1e-3)


def test_budgets_are_averages_with_a_point_and_bytes_with_a_unit() -> None:
    outputs = load_recipe(
        "outputs: {a: {to: gptq, bits: 4}, b: {to: gptq, bits: 4.0}, c: {to: gguf, size: 1.5MiB}}"
    ).outputs
    assert [type(output.bits) for output in outputs.values()] == [int, float, type(None)]
    assert outputs["c"].size == 1.5 * 2**20
    with pytest.raises(InputError, match="size: is no amount of bytes"):
        load_recipe("outputs: {a: {to: gguf, size: much}}")


def test_json_is_yaml_and_anchors_save_repetition(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"outputs": {"a": {"to": "awq"}}}))
    assert read_recipe(tmp_path / "r.json").recipe.outputs["a"].to == "awq"
    shared = load_recipe("outputs:\n  a: &a {to: awq, ignore: [v_proj]}\n  b: {<<: *a, to: gptq}\n")
    assert shared.outputs["b"].ignore == ("v_proj",)
    assert shared.outputs["b"].to == "gptq"


def test_files_that_are_no_recipes_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    for path, message in (("bytes", "not UTF-8"), ("large", "is larger than"), (".", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_recipe(tmp_path / path)
    with pytest.raises(InputError, match="no such file") as caught:
        read_recipe("awq-4bits")
    assert "Did you mean 'awq-4bit'?" in (caught.value.hint or "")


def test_the_published_schema_is_the_models() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text()


def test_a_dozen_recipes_ship_and_each_says_what_it_is() -> None:
    assert len(shipped_names()) >= 12
    for name in shipped_names():
        assert read_recipe(name).recipe.description
