"""Files written here are read back here, by gguf-py and by transformers, as the model they were written from."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.checkpoint.gguf_writer import GgufTensorPlan, GgufWriter
from aphroquant.errors import InputError, ResourceError, UsageError
from aphroquant.formats.gguf import block_type, exact_type, quantize, type_for_rows
from aphroquant.schemes import IntegerScheme, LookupScheme, QuantizedWeight

Tiny = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
TEXT = "The capital of France is Paris; 10, 20 and 300 are numbers.\n<|im_start|>user\n"


def plan_of(checkpoint: Checkpoint, kind: str) -> dict[str, GgufTensorPlan]:
    def chosen(shape: tuple[int, ...]) -> str:
        return "F32" if len(shape) == 1 else type_for_rows(block_type(kind), shape[-1]).name

    return {name: GgufTensorPlan(info.shape, chosen(info.shape)) for name, info in checkpoint.tensors.items()}


def write(path: Path, checkpoint: Checkpoint, kind: str = "F32", **options: Any) -> Path:
    plan = plan_of(checkpoint, kind)
    with GgufWriter(path, checkpoint.config, checkpoint.tokenizer(), **options) as writer:
        writer.plan(plan)
        for name in reversed(plan):  # any order will do
            writer.add(name, checkpoint.read(name))
        return writer.finish()


@pytest.fixture
def tiny(tiny_checkpoint: Tiny) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint("llama"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_float_file_is_read_back_as_the_checkpoint(
    family: str, tied: bool, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    original = open_checkpoint(tiny_checkpoint(family, tie_word_embeddings=tied, sliding_window=None))
    found = open_checkpoint(write(tmp_path / "a.gguf", original))
    assert found.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(found.read(name), original.read(name)) for name in original.tensors)
    expected = {**vars(original.spec), "family": "llama"} if family == "mistral" else vars(original.spec)
    assert vars(found.spec) == expected
    ours, theirs = found.tokenizer(), original.tokenizer()
    if family != "qwen3":  # whose tiny tokenizer composes characters or not, which a GGUF file cannot say
        assert ours(TEXT).input_ids == theirs(TEXT).input_ids
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map.items() >= theirs.special_tokens_map.items()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_names_rows_and_metadata_are_those_of_a_file_that_gguf_py_wrote(
    family: str, tiny_gguf: Tiny, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    ours = gguf.GGUFReader(write(tmp_path / "a.gguf", open_checkpoint(tiny_checkpoint(family))))
    theirs = gguf.GGUFReader(tiny_gguf(family))
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type
        assert np.array_equal(tensor.data, expected[tensor.name].data), tensor.name
        assert tensor.data_offset % 32 == 0
    for key, field in theirs.fields.items():
        if key.startswith(("GGUF.", "tokenizer.")):  # counts; the tiny vocabulary is filled up
            continue
        assert ours.fields[key].contents() == field.contents(), key
        assert ours.fields[key].types == field.types, key
    assert ours.fields["tokenizer.ggml.merges"].contents() == theirs.fields["tokenizer.ggml.merges"].contents()
    tokens = theirs.fields["tokenizer.ggml.tokens"].contents()
    assert ours.fields["tokenizer.ggml.tokens"].contents()[: len(tokens)] == tokens
    types = ours.fields["tokenizer.ggml.token_type"].contents()
    assert types == [*theirs.fields["tokenizer.ggml.token_type"].contents(), *[5] * (384 - len(tokens))]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
def test_transformers_computes_the_same_logits_from_the_file(
    family: str, kind: str, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    head_dim = 128 if family == "qwen3" else 32  # transformers has no other for Qwen3 in GGUF files
    source = tiny_checkpoint(family, hidden_size=256, intermediate_size=256, num_attention_heads=8, head_dim=head_dim)
    path = write(tmp_path / "a.gguf", open_checkpoint(source), kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    written = open_checkpoint(path)
    reference.load_state_dict({name: written.read(name).float() for name in written.tensors})
    token_ids = torch.randint(0, 384, (2, 24))
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, reference(token_ids).logits)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4", "BF16"])
def test_dense_weights_are_quantized_to_the_planned_type(kind: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint("llama", hidden_size=256, intermediate_size=512))
    path = write(tmp_path / "a.gguf", source, kind)
    found = open_checkpoint(path)
    for module in (Q_PROJ, "model.layers.1.mlp.down_proj", "lm_head"):
        expected = quantize(block_type(kind), source.read(f"{module}.weight"))
        assert found.schemes()[module] == expected.scheme
        assert torch.equal(found.weight(module).dequantize(), expected.dequantize()), module
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensor = stored["blk.1.ffn_down.weight"]
    dequantized = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(torch.from_numpy(dequantized), found.read("model.layers.1.mlp.down_proj.weight").float())


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (IntegerScheme(4, 32, symmetric=True), "Q4_0"),
        (IntegerScheme(4, None, symmetric=True), "Q4_0"),
        (IntegerScheme(4, 64, symmetric=False), "Q5_0"),
        (IntegerScheme(8, None, symmetric=True), "Q8_0"),
    ],
    ids=str,
)
def test_quantized_weights_are_written_to_the_last_bit(
    scheme: IntegerScheme, kind: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    weights = {}
    plan = plan_of(tiny, "F32")
    for module in tiny.spec.modules():
        shape = plan[f"{module}.weight"].shape
        shapes = scheme.shapes(*shape)
        tensors = {"codes": torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)}
        tensors["scales"] = torch.randn(shapes["scales"]).half()
        if "zeros" in shapes:
            tensors["zeros"] = torch.randint(0, 2**scheme.bits, shapes["zeros"], dtype=torch.uint8)
        weights[f"{module}.weight"] = QuantizedWeight(scheme, tensors, shape)
        plan[f"{module}.weight"] = GgufTensorPlan(shape, kind)
    with GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer:
        writer.plan(plan)
        for name in plan:
            writer.add(name, weights.get(name, tiny.read(name)))
        found = open_checkpoint(writer.finish())
    for name, weight in weights.items():
        assert torch.equal(found.read(name), weight.dequantize()), name


def test_an_nvfp4_weight_is_written_with_its_global_scale(tiny: Checkpoint, tmp_path: Path) -> None:
    plan = plan_of(tiny, "F32")
    plan[f"{Q_PROJ}.weight"] = GgufTensorPlan((64, 64), "NVFP4")
    tensors = {
        "codes": torch.randint(0, 16, (64, 64), dtype=torch.uint8),
        "scales": torch.rand(64, 4).to(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.3, dtype=torch.float32).double(),
    }
    weight = QuantizedWeight(LookupScheme("e2m1", 16, "e4m3"), tensors, (64, 64))
    with GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer:
        writer.plan(plan)
        for name in plan:
            writer.add(name, weight if name == f"{Q_PROJ}.weight" else tiny.read(name))
        found = open_checkpoint(writer.finish())
    assert torch.equal(found.weight(Q_PROJ).dequantize(), weight.dequantize())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert stored["blk.0.attn_q.scale"].data.tolist() == [np.float32(0.3)]


def test_importance_reaches_the_encoder(tiny: Checkpoint, tmp_path: Path) -> None:
    importance = torch.randn(64).mul(2).exp()
    name = f"{Q_PROJ}.weight"
    with GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer:
        writer.plan(
            {name: GgufTensorPlan((64, 64), "Q4_1"), "model.embed_tokens.weight": GgufTensorPlan((384, 64), "F16")}
        )
        writer.add(name, tiny.read(name), importance=importance)
        writer.add("model.embed_tokens.weight", tiny.read("model.embed_tokens.weight"))
        found = open_checkpoint(writer.finish())
    expected = quantize(block_type("Q4_1"), tiny.read(name), importance)
    assert torch.equal(found.read(name), expected.dequantize())


@pytest.mark.sample_model
def test_the_sample_model_is_repacked_byte_for_byte(sample_model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(sample_model)
    plan = plan_of(source, "F32")
    for module, scheme in source.schemes().items():
        shape = plan[f"{module}.weight"].shape
        plan[f"{module}.weight"] = GgufTensorPlan(shape, exact_type(module, scheme, shape[1]).name)
    with GgufWriter(tmp_path / "a.gguf", source.config, source.tokenizer()) as writer:
        writer.plan(plan)
        for name in plan:
            module = name.removesuffix(".weight")
            writer.add(name, source.weight(module) if module in source.schemes() else source.read(name))
        writer.finish()
    ours, theirs = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(sample_model)
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert all(np.array_equal(tensor.data, expected[tensor.name].data) for tensor in ours.tensors)
    assert len(ours.tensors) == len(expected)
    for key in ("tokens", "token_type", "merges", "pre", "bos_token_id", "eos_token_id", "padding_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert ours.fields[name].contents() == theirs.fields[name].contents(), key


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
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "beta_fast": 16.0},
    ],
    ids=str,
)
def test_rope_scaling_is_read_back(scaling: dict[str, Any], tiny: Checkpoint, tmp_path: Path) -> None:
    config = {**tiny.config, "rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": scaling}
    found = open_checkpoint(embedding_only(tmp_path / "a.gguf", tiny, config))
    parameters = {key: value for key, value in scaling.items() if key != "rope_type"}
    assert found.spec.rope.kind == scaling["rope_type"]
    assert found.spec.rope.theta == 500_000
    assert found.spec.rope.parameters == parameters


def embedding_only(path: Path, checkpoint: Checkpoint, config: dict[str, Any]) -> Path:
    """A file with nothing but the embedding."""
    name = "model.embed_tokens.weight"
    with GgufWriter(path, {**config, "num_hidden_layers": 1}, checkpoint.tokenizer()) as writer:
        writer.plan({name: GgufTensorPlan((384, 64), "F32")})
        writer.add(name, checkpoint.read(name))
        return writer.finish()


def test_the_context_ends_where_a_sliding_window_would_cut(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint("mistral", sliding_window=100))
    found = open_checkpoint(write(tmp_path / "a.gguf", source))
    assert found.spec.max_position_embeddings == 100
    assert found.spec.sliding_windows == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": "qwen3", "attention_bias": True}, "qwen3 has no attention biases"),
        ({"model_type": "qwen2", "head_dim": 32}, r"num_attention_heads = 16 channels, and this model's have 32"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0, "rope_theta": 1e4}},
            "GGUF has no keys for these YaRN parameters",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False, "rope_theta": 1e4}},
            "GGUF has no keys for these YaRN parameters",
        ),
        ({"vocab_size": 300}, "the tokenizer has the token 359, and the model only 300 rows"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(
    changes: dict[str, Any], message: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, InputError), match=message):
        embedding_only(tmp_path / "a.gguf", tiny, {**tiny.config, **changes})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        ("model.vision.weight", (4, 4), "F32", "model.vision.weight: llama.cpp's llama has no such tensor"),
        (f"{Q_PROJ}.weight", (64, 64), "Q4_K", "Q4_K needs rows that are a multiple of 256, not 64"),
        (f"{Q_PROJ}.weight", (64, 64), "Q9", "unknown GGUF type 'Q9'"),
        (f"{Q_PROJ}.weight", (2, 64, 64), "F32", r"shape \[2, 64, 64\]; vectors and matrices"),
        (f"{Q_PROJ}.weight", (0, 64), "F32", r"shape \[0, 64\]"),
        ("model.norm.weight", (64,), "Q8_0", "is a vector, which llama.cpp needs in F32, not Q8_0"),
    ],
)
def test_a_plan_that_gguf_cannot_hold_is_refused(
    name: str, shape: tuple[int, ...], kind: str, message: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    with (
        pytest.raises(UsageError, match=message),
        GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer,
    ):
        writer.plan({name: GgufTensorPlan(shape, kind)})
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_does_not_fit_its_plan_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    weight = quantize(block_type("Q4_0"), torch.randn(64, 64))
    with GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer:
        writer.plan({f"{Q_PROJ}.weight": GgufTensorPlan((64, 64), "Q4_1")})
        with pytest.raises(UsageError, match="int4 sym g32 is Q4_0 in GGUF, not Q4_1") as caught:
            writer.add(f"{Q_PROJ}.weight", weight)
        assert "plan Q4_0" in str(caught.value.hint)
        with pytest.raises(UsageError, match=r"has shape \[32, 64\], but \[64, 64\] was planned"):
            writer.add(f"{Q_PROJ}.weight", torch.randn(32, 64))
        with pytest.raises(InputError, match=f"{Q_PROJ}.weight holds values that are not finite"):
            writer.add(f"{Q_PROJ}.weight", torch.full((64, 64), torch.nan))


def test_a_file_is_complete_or_not_there(tiny: Checkpoint, tmp_path: Path) -> None:
    path, name = tmp_path / "a.gguf", "model.norm.weight"
    with GgufWriter(path, tiny.config, tiny.tokenizer()) as writer:
        writer.plan({name: GgufTensorPlan((64,), "F32")})
        writer.add(name, tiny.read(name))
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), GgufWriter(path, tiny.config, tiny.tokenizer()) as writer:
        writer.plan({name: GgufTensorPlan((64,), "F32")})
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_unless_it_is_to_be_overwritten(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"a\.gguf exists") as caught:
        write(path, tiny, "Q8_0")
    assert "--overwrite" in str(caught.value.hint)
    with pytest.raises(RuntimeError), GgufWriter(path, tiny.config, tiny.tokenizer(), overwrite=True) as writer:
        writer.plan(plan_of(tiny, "Q8_0"))
        raise RuntimeError
    assert path.read_bytes() == before
    write(path, tiny, "Q8_0", overwrite=True, name="my model")
    assert len(path.read_bytes()) < len(before)
    assert gguf.GGUFReader(path).fields["general.name"].contents() == "my model"


def test_a_file_can_be_rewritten_while_it_is_read(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny)
    write(path, open_checkpoint(path), "F32", overwrite=True)
    assert torch.equal(open_checkpoint(path).read(f"{Q_PROJ}.weight"), tiny.read(f"{Q_PROJ}.weight"))


def test_a_directory_is_no_place_for_the_file(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory") as caught:
        write(tmp_path, tiny)
    assert ".gguf" in str(caught.value.hint)


def test_a_full_disk_is_a_resource_error_and_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match=r"a\.gguf: the disk is full"):
            write(tmp_path / "a.gguf", tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_file_of_that_name(tiny: Checkpoint, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from aphroquant.checkpoint import open_checkpoint
from aphroquant.checkpoint.gguf_writer import GgufTensorPlan, GgufWriter
source = open_checkpoint({str(tiny.path)!r})
with GgufWriter(Path({str(tmp_path / "a.gguf")!r}), source.config, source.tokenizer()) as writer:
    writer.plan({{"model.norm.weight": GgufTensorPlan((64,), "F32")}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".a.gguf.partial-")


def test_the_size_is_known_when_the_file_is_planned(tiny: Checkpoint, tmp_path: Path) -> None:
    with GgufWriter(tmp_path / "a.gguf", tiny.config, tiny.tokenizer()) as writer:
        writer.plan(plan_of(tiny, "Q8_0"))
        expected = writer.num_bytes
        for name in tiny.tensors:
            writer.add(name, tiny.read(name))
        assert writer.finish().stat().st_size == expected
