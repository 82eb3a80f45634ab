"""llama.cpp judges: it loads every file written here, splits text as the original tokenizer, and computes its logits.

It runs in an environment of its own; without it these tests are skipped, naming the commands that make it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.checkpoint.gguf_splitting import SPLITTINGS
from aphroquant.checkpoint.gguf_tokenizer import build_tokenizer
from aphroquant.checkpoint.gguf_writer import GgufTensorPlan, GgufWriter
from aphroquant.formats.gguf import block_type, exact_type, type_for_rows
from aphroquant.schemes import LookupScheme, QuantizedWeight

VERSION = "2026.10.11549"  # of xllamacpp
WORKER = Path(__file__).parent / "workers" / "llama_cpp_worker.py"
# Largest difference of logits, as a share of the largest logit. llama.cpp keeps keys and values in float16, and rounds
# the inputs of quantized layers to 8 bits.
TOLERANCES = {"F32": 2e-3, "F16": 5e-3, "BF16": 2e-2}
QUANTIZED_TOLERANCE = 5e-2
SAMPLE_TOLERANCE = 0.1  # its down_proj has outlying inputs, which share a scale with 255 others in front of K-quants
TEXTS = [
    "",
    "Hello! How are you today?",
    "In 1984, 2 + 2 made 4; 3.14159 and 1000000.",
    "Größe, 漢字, \u0661\u0662\u0663, emoji \N{GRINNING FACE}",
    "def forward(self, x):\n    return x * 2\n\n\n# it's, they'RE\r\n\t\ttabs  ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
]
PROMPT = [1, 40, 50, 60, 70, 300, 301, 302, 12, 99, 150, 200]

Tiny = Callable[..., Path]


class Answer(NamedTuple):
    tokens: list[list[int]]
    greedy: list[int]
    logits: torch.Tensor


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answer]:
    """`llama_cpp(path, texts=[...], prompt=[...], num_tokens=8)`: what llama.cpp makes of a file."""
    cache = Path(os.environ.get("APHROQUANT_CACHE") or Path.home() / ".cache" / "aphroquant").expanduser()
    python = cache / "interop" / f"xllamacpp-{VERSION}" / "bin" / "python"
    if not python.exists():
        folder = python.parent.parent
        pytest.skip(f"python3 -m venv {folder} && {folder}/bin/pip install numpy xllamacpp=={VERSION} makes it run")

    def run(model: Path, texts: list[str] = TEXTS, prompt: list[int] = PROMPT, num_tokens: int = 8) -> Answer:
        folder = tmp_path_factory.mktemp("llama_cpp")
        request = {"model": str(model), "texts": texts, "prompt": prompt, "num_tokens": num_tokens}
        (folder / "request.json").write_text(json.dumps(request))
        command = [python, WORKER, folder / "request.json", folder / "logits.npy"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        return Answer(answer["tokens"], answer["greedy"], torch.from_numpy(np.load(folder / "logits.npy")))

    return run


def write(path: Path, source: Checkpoint, kind: str) -> Checkpoint:
    """`kind` "exact": quantized weights as they are."""
    schemes = source.schemes()

    def chosen(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        if kind == "exact":
            return exact_type(name, schemes[name.removesuffix(".weight")], shape[1]).name
        return type_for_rows(block_type(kind), shape[1]).name

    plan = {name: GgufTensorPlan(info.shape, chosen(name, info.shape)) for name, info in source.tensors.items()}
    with GgufWriter(path, source.config, source.tokenizer()) as writer:
        writer.plan(plan)
        for name, planned in plan.items():
            exact = kind == "exact" and len(planned.shape) == 2
            writer.add(name, source.weight(name.removesuffix(".weight")) if exact else source.read(name))
        return open_checkpoint(writer.finish())


def reference(written: Checkpoint, config: dict[str, Any]) -> Any:
    """transformers' model of `config` with the file's dequantized weights, in float32."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **settings)
    state = {name: written.read(name).float() for name in written.tensors}
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)].from_pretrained(
        None, config=made, state_dict=state, dtype=torch.float32, output_loading_info=True
    )  # which spends no time on random numbers first
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= ({"lm_head.weight"} if config.get("tie_word_embeddings") else set())
    return model.eval()


def assert_same_logits(answer: Answer, model: Any, tolerance: float, prompt: list[int] = PROMPT) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    assert answer.logits.shape == expected.shape
    difference = float((answer.logits - expected).abs().max() / expected.abs().max())
    assert difference < tolerance, f"{difference:.2e}"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_float_files_give_transformers_logits_and_greedy_tokens(
    family: str, tied: bool, tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint(family, tie_word_embeddings=tied))
    written = write(tmp_path / "a.gguf", source, "F32")
    answer = llama_cpp(written.path)
    model = reference(written, source.config)
    assert_same_logits(answer, model, TOLERANCES["F32"])
    with torch.no_grad():
        expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert answer.greedy == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "kind",
    ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "IQ4_NL"],
)
def test_files_of_every_type_give_the_logits_of_their_dequantized_weights(
    kind: str, tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama", hidden_size=256, intermediate_size=512))
    written = write(tmp_path / "a.gguf", source, kind)
    tolerance = TOLERANCES.get(kind, QUANTIZED_TOLERANCE)
    assert_same_logits(llama_cpp(written.path), reference(written, source.config), tolerance)


def test_nvfp4_weights_and_their_global_scales_are_understood(
    tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    plan = {
        name: GgufTensorPlan(info.shape, "NVFP4" if name.endswith("proj.weight") else "F32")
        for name, info in source.tensors.items()
    }
    with GgufWriter(tmp_path / "a.gguf", source.config, source.tokenizer()) as writer:
        writer.plan(plan)
        for name, planned in plan.items():
            writer.add(name, nvfp4(planned.shape) if planned.type == "NVFP4" else source.read(name))
        written = open_checkpoint(writer.finish())
    assert_same_logits(llama_cpp(written.path), reference(written, source.config), QUANTIZED_TOLERANCE)


def nvfp4(shape: tuple[int, ...]) -> QuantizedWeight:
    rows, columns = shape
    tensors = {
        "codes": torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        "scales": (1 + torch.rand(rows, columns // 16) * 100).to(torch.float8_e4m3fn),
        "global_scale": torch.tensor(2.0**-11 * (1 + torch.rand(()).half().item()), dtype=torch.float64),
    }
    return QuantizedWeight(LookupScheme("e2m1", 16, "e4m3"), tensors, (rows, columns))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_positions_give_transformers_logits(
    scaling: dict[str, Any], tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    rope = {**scaling, "rope_theta": 10000.0}
    source = open_checkpoint(tiny_checkpoint("llama", rope_parameters=rope))
    written = write(tmp_path / "a.gguf", source, "F32")
    assert_same_logits(llama_cpp(written.path), reference(written, source.config), TOLERANCES["F32"])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken"])
def test_text_is_split_into_the_original_tokenizers_ids(
    name: str, tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    original = splitting_as(name, source.tokenizer())
    plan = {key: GgufTensorPlan(info.shape, "F32") for key, info in source.tensors.items()}
    with GgufWriter(tmp_path / "a.gguf", source.config, original) as writer:
        writer.plan(plan)
        for key in plan:
            writer.add(key, source.read(key))
        path = writer.finish()
    assert llama_cpp(path).tokens == [original(text).input_ids for text in TEXTS]


def splitting_as(name: str, tokenizer: Any) -> Any:
    """The tokenizer with the named splitting, and a beginning token where that adds one."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitting = SPLITTINGS[name]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.expression is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.expression), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = splitting.ignore_merges
    bos = tokenizer.bos_token
    if splitting.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=tokenizer.eos_token)


@pytest.mark.parametrize("name", ["prefix", "plain"])
def test_sentencepiece_text_is_split_as_sentencepiece_does(
    name: str, tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    model = json.loads((Path(__file__).parent.parent / "checkpoint" / "sentencepiece.json").read_text())[name]
    values = {
        "model": "llama",
        "tokens": model["tokens"],
        "scores": np.array(model["scores"], dtype=np.float32),
        "token_type": np.array(model["types"], dtype=np.int32),
        "unknown_token_id": 0,
        "add_bos_token": False,
        "add_space_prefix": name == "prefix",
    }
    tokenizer = build_tokenizer({f"tokenizer.ggml.{key}": value for key, value in values.items()}, 512)
    source = open_checkpoint(tiny_checkpoint("llama", vocab_size=480))
    with GgufWriter(tmp_path / "a.gguf", source.config, tokenizer) as writer:
        writer.plan({key: GgufTensorPlan(info.shape, "F32") for key, info in source.tensors.items()})
        for key in source.tensors:
            writer.add(key, source.read(key))
        path = writer.finish()
    assert llama_cpp(path, model["texts"]).tokens == model["ids"]


@pytest.mark.sample_model
def test_the_repacked_sample_model_answers_as_the_original_file(
    sample_model: Path, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = open_checkpoint(sample_model)
    tokenizer = source.tokenizer()
    written = write(tmp_path / "a.gguf", source, "exact")
    prompt = tokenizer("The capital of France is").input_ids
    ours = llama_cpp(written.path, TEXTS, prompt, 16)
    theirs = llama_cpp(sample_model, TEXTS, prompt, 16)
    assert ours.tokens == theirs.tokens == [tokenizer(text).input_ids for text in TEXTS]
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.greedy == theirs.greedy
    assert tokenizer.decode(ours.greedy).startswith(" Paris.")


def converted(source: Path, out: Path, **options: Any) -> Checkpoint:
    """What `aphroquant convert --to gguf` writes."""
    from aphroquant.cli import run

    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert run(["convert", str(source), "--to", "gguf", "--out", str(out), "--requantize", *arguments]) == 0
    return open_checkpoint(out)


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("gptq", {"bits": 4, "group_size": 32, "symmetric": True}),
        ("awq", {"symmetric": False}),
        ("compressed-tensors", {"scheme": "w8a16"}),
        ("gptq", {"bits": 3, "group_size": 32}),
    ],
)
def test_repacked_checkpoints_of_other_formats_give_their_own_logits(
    first: str, options: dict[str, Any], tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    from aphroquant.conversion import convert

    source = tiny_checkpoint("llama", torch_dtype="float16")
    convert(source, to=first, out=tmp_path / "one", samples=0, solver="rtn", **options)
    written = converted(tmp_path / "one", tmp_path / "a.gguf")
    original = open_checkpoint(tmp_path / "one")
    state = {f"{module}.weight": original.weight(module).dequantize() for module in original.schemes()}
    assert all(torch.equal(written.read(name).float(), weight) for name, weight in state.items())
    assert_same_logits(llama_cpp(written.path), reference(written, original.config), QUANTIZED_TOLERANCE)


@pytest.mark.parametrize("scheme", ["q4_k_m", "q5_k_m", "q4_0", "q6_k", "mxfp4"])
def test_what_the_command_line_writes_gives_the_logits_of_its_dequantized_weights(
    scheme: str, tiny_checkpoint: Tiny, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    source = tiny_checkpoint("mistral", hidden_size=256, intermediate_size=512, sliding_window=None)
    written = converted(source, tmp_path / "a.gguf", scheme=scheme)
    answer = llama_cpp(written.path)
    assert answer.tokens == [open_checkpoint(source).tokenizer()(text).input_ids for text in TEXTS]
    assert_same_logits(answer, reference(written, open_checkpoint(source).config), QUANTIZED_TOLERANCE)


@pytest.mark.sample_model
@pytest.mark.parametrize("scheme", ["q4_k_m", "q8_0"])
def test_the_sample_model_in_other_types_still_knows_the_capital_of_france(
    scheme: str, sample_model: Path, llama_cpp: Callable[..., Answer], tmp_path: Path
) -> None:
    written = converted(sample_model, tmp_path / "a.gguf", scheme=scheme)
    tokenizer = written.tokenizer()
    prompt = tokenizer("The capital of France is").input_ids
    answer = llama_cpp(written.path, TEXTS, prompt, 8)
    assert tokenizer.decode(answer.greedy).startswith(" Paris")
    assert answer.tokens == [tokenizer(text).input_ids for text in TEXTS]
    assert_same_logits(answer, reference(written, written.config), SAMPLE_TOLERANCE, prompt)
    if scheme == "q8_0":  # one is enough to show that the rest is the rounding of inputs
        unrounded = llama_cpp(converted(written.path, tmp_path / "f32.gguf", scheme="f32").path, TEXTS, prompt, 1)
        assert_same_logits(unrounded, reference(written, written.config), TOLERANCES["F32"], prompt)
