"""The model card: metadata that the Hub takes, what was measured and how, and commands that are known to work."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.gguf import GgufCheckpoint
from aphroquant.errors import InputError
from aphroquant.provenance.base_card import parse_card
from aphroquant.provenance.card import model_card
from aphroquant.provenance.metrics import record_evaluation
from aphroquant.provenance.verification import verify_files


def manifest(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "aphroquant.json").read_text())
    return content


def test_the_hub_reads_the_metadata_and_they_carry_over_what_stays_true(made: Path) -> None:
    data = ModelCard.load(made / "README.md").data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("tiny-license", "LICENSE")
    assert data["language"] == ["en", "no"]
    assert data["tags"] == ["tiny", "4-bit", "aphroquant", "quantized", "gptq"]
    assert data["base_model_relation"] == "quantized"
    assert data["quantized_by"] == "aphroquant"
    assert data["pipeline_tag"] == "text-generation"
    assert data["library_name"] == "transformers"
    assert "datasets" not in data
    assert (made / "LICENSE").exists()


def test_the_text_of_the_source_is_not_lost(made: Path) -> None:
    text = (made / "README.md").read_text()
    assert "## Card of the base model\n\n# Tiny\n\nA model with | a bar." in text


def test_a_source_from_the_hub_is_the_base_model(source: Path, made: Path) -> None:
    checkpoint = open_checkpoint(source)
    told = manifest(made)
    told["source"] = {"format": "dense", "repository": "org/Tiny", "revision": "0123456789abcdef"}
    told["request"]["source"] = told["result"]["source"] = "org/Tiny"
    card = ModelCard(model_card(told, checkpoint, "Tiny-GPTQ"))
    base_model = card.data.to_dict()["base_model"]
    validate_repo_id(base_model)
    assert base_model == "org/Tiny"
    assert "[org/Tiny](https://huggingface.co/org/Tiny) at `0123456789ab`" in card.text
    assert "aphroquant convert org/Tiny --to gptq" in card.text


def test_the_command_in_the_card_makes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    from aphroquant.cli import run

    rules = ["layers[0]: keep", "down_proj: bits=8, group-size=32"]
    aphroquant.convert(source, to="gptq", solver="rtn", samples=0, rules=rules, ignore="o_proj", out=tmp_path / "one")
    text = (tmp_path / "one" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("aphroquant convert"))
    words = shlex.split(line)[1:]
    words[words.index("Tiny-Model")] = str(source)
    words[words.index("--out") + 1] = str(tmp_path / "two")
    assert run(words) == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_only_engines_known_to_load_it_are_told(made: Path, source: Path, tmp_path: Path) -> None:
    text = (made / "README.md").read_text()
    assert "vllm serve Tiny-GPTQ" in text
    assert "AutoModelForCausalLM" in text
    assert "llama-server" not in text
    aphroquant.convert(source, to="gptq", bits=3, solver="rtn", samples=0, out=tmp_path / "three")
    text = (tmp_path / "three" / "README.md").read_text()
    assert "aphroquant serve three" in text
    assert "vllm" not in text


def test_a_gguf_file_in_a_directory_of_its_own_gets_a_card(source: Path, tmp_path: Path) -> None:
    aphroquant.convert(source, to="gguf", scheme="q8_0", out=tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert data["library_name"] == "gguf"
    assert "8-bit" in data["tags"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m Tiny-Model-Q8_0.gguf" in text
    (tmp_path / "out" / "README.md").write_text("mine")
    aphroquant.convert(source, to="gguf", scheme="q4_0", out=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_gguf_source_says_of_itself_what_a_card_would(gguf: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf)
    assert isinstance(checkpoint, GgufCheckpoint)
    checkpoint.metadata |= {
        "general.license": "apache-2.0",
        "general.languages": ["en"],
        "general.tags": 5,
        "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny",
    }
    told = json.loads(Path(f"{gguf}.aphroquant.json").read_text())
    data = ModelCard(model_card(told, checkpoint, "Tiny-AWQ")).data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", ["en"], "org/Tiny")


def test_an_evaluation_is_recorded_in_manifest_card_and_check_sums(output: Path, source: Path) -> None:
    result = aphroquant.evaluate(output, against=source, windows=2, window_len=64)
    before = (output / "README.md").read_text()
    record_evaluation(output, result.to_dict())
    assert verify_files(output).passed
    assert manifest(output)["metrics"]["mean_kld"] == result.mean_kld
    text = (output / "README.md").read_text()
    assert f"{result.mean_kld:.5f}" in text
    assert "2 windows of 64 tokens, evenly spaced, of default (SHA-256" in text
    again = dataclasses.replace(result, mean_kld=float("nan"))
    record_evaluation(output, again.to_dict())
    text = (output / "README.md").read_text()
    assert "| mean KL divergence, nats | not finite" in text
    assert text.partition("## Quality")[0] == before.partition("## Quality")[0]
    assert text.partition("## How it was made")[2] == before.partition("## How it was made")[2]
    (output / "README.md").write_bytes(b"my own \xff")
    record_evaluation(output, again.to_dict())
    assert (output / "README.md").read_bytes() == b"my own \xff"


def test_figures_need_an_output_to_be_recorded_in(source: Path) -> None:
    with pytest.raises(InputError, match="to write the figures into"):
        record_evaluation(source, {})


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        ("", {}),
        ("---\nlicense: mit\n---\ntext", {"license": "mit"}),
        ("---\r\nlicense: mit\r\n---\r\ntext", {"license": "mit"}),
        ("---\nlicense: [unclosed\n---\ntext", {}),
        ("---\n- a list\n---\ntext", {}),
        ("---\nlicense: {a: b}\nlanguage: no\ntags: [1, fine, [deep]]\n---\n", {"language": "no", "tags": ["fine"]}),
        ("---\nlicense: 2024-99-99\ntags: null\n---\n", {}),
        ("---\nlicense: '" + "x" * 1000 + "'\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
    ],
)
def test_a_card_of_any_content_gives_words_or_nothing(content: str, metadata: dict[str, Any]) -> None:
    assert parse_card(content).metadata == metadata
