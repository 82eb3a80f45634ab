"""gguf-py and transformers judge: files written by the one are read here as the other reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from aphroquant.checkpoint import Checkpoint, open_checkpoint
from aphroquant.errors import InputError
from aphroquant.models.rope import inverse_frequencies
from aphroquant.models.spec import RopeSpec
from aphroquant.schemes import DenseScheme, IntegerScheme

Tiny = Callable[..., Path]
FAMILIES = ["llama", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_float_file_equals_the_checkpoint_it_was_made_from(
    family: str, tied: bool, tiny_gguf: Tiny, tiny_checkpoint: Tiny
) -> None:
    original = open_checkpoint(tiny_checkpoint(family, tie_word_embeddings=tied))
    checkpoint = open_checkpoint(tiny_gguf(family, tie_word_embeddings=tied))
    assert checkpoint.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(checkpoint.read(name), original.read(name)) for name in original.tensors)
    assert checkpoint.spec == original.spec
    assert checkpoint.config["dtype"] == "float32"
    assert checkpoint.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_tensors_from_the_same_file(family: str, tiny_gguf: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_gguf(family, "Q8_0", vocab_size=360)  # as many as there are tokens, which is what transformers counts
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    checkpoint = open_checkpoint(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "F16", "BF16"])
def test_weights_are_the_files_numbers_in_hugging_face_order(kind: str, tiny_gguf: Tiny, tiny_checkpoint: Tiny) -> None:
    original = open_checkpoint(tiny_checkpoint("llama"))
    checkpoint = open_checkpoint(tiny_gguf("llama", kind))
    ggml_type = gguf.GGMLQuantizationType[kind]
    for module, scheme in checkpoint.schemes().items():
        dense = original.read(f"{module}.weight").numpy()
        expected = gguf.quants.dequantize(gguf.quants.quantize(dense, ggml_type), ggml_type)
        weight = checkpoint.weight(module)
        weight.check(module)
        assert weight.scheme == scheme
        assert torch.equal(weight.dequantize(), torch.from_numpy(expected)), module
        assert torch.equal(checkpoint.read(f"{module}.weight").float(), torch.from_numpy(expected)), module
    assert set(original.schemes()) == set(checkpoint.schemes())


def test_quantized_files_say_what_they_hold(tiny_gguf: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_gguf("qwen2", "Q4_1"))
    assert checkpoint.format_name == "gguf"
    assert checkpoint.format is None
    assert checkpoint.quantization_config is None
    assert checkpoint.config["dtype"] == "float16"
    scheme = checkpoint.schemes()["model.layers.0.self_attn.q_proj"]
    assert scheme == IntegerScheme(4, 32, symmetric=False, has_offsets=True)
    dense = checkpoint.dense_names()
    assert "model.layers.0.self_attn.q_proj.bias" in dense
    assert "model.norm.weight" in dense
    assert not any(name.endswith("proj.weight") for name in dense)
    info = checkpoint.info("model.layers.0.self_attn.q_proj.weight")
    assert info.shape == (64, 64)
    assert info.nbytes == 64 * 64 * 20 // 32


def test_a_bfloat16_file_computes_in_bfloat16(tiny_gguf: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_gguf("llama", "BF16"))
    assert checkpoint.config["dtype"] == "bfloat16"
    assert checkpoint.schemes()["lm_head"] == DenseScheme(torch.bfloat16)


@pytest.mark.sample_model
def test_the_sample_model_is_read_bit_for_bit(sample_model: Path) -> None:
    checkpoint = open_checkpoint(sample_model)
    assert sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values()) == 134_515_008
    assert checkpoint.spec.rope.theta == 100_000
    reader = gguf.GGUFReader(sample_model)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = {"blk.29.ffn_down": "model.layers.29.mlp.down_proj", "blk.0.attn_v": "model.layers.0.self_attn.v_proj"}
    for theirs, ours in names.items():
        tensor = stored[f"{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(checkpoint.weight(ours).dequantize(), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "NVFP4"])
def test_blocks_that_gguf_py_only_reads_are_its_bits_in_hugging_face_order(kind: str, tmp_path: Path) -> None:
    ggml_type = gguf.GGMLQuantizationType[kind]
    data = block_bytes(kind, 128, 512)
    checkpoint = open_checkpoint(one_layer_gguf(tmp_path / "a.gguf", data, ggml_type))
    weight = checkpoint.weight("model.layers.0.self_attn.q_proj")
    weight.check("q_proj")
    stored = gguf.quants.dequantize(data, ggml_type)  # [head, channel, half, K] in llama.cpp's order
    expected = stored.reshape(2, 32, 2, 512).swapaxes(1, 2).reshape(128, 512)
    assert weight.scheme == checkpoint.schemes()["model.layers.0.self_attn.q_proj"]
    assert torch.equal(weight.dequantize(), torch.from_numpy(expected))


def test_nvfp4_takes_the_scale_of_the_whole_tensor_from_the_tensor_beside_it(tmp_path: Path) -> None:
    data, name = block_bytes("NVFP4", 128, 512), "model.layers.0.self_attn.q_proj"
    ggml_type = gguf.GGMLQuantizationType.NVFP4
    plain = open_checkpoint(one_layer_gguf(tmp_path / "a.gguf", data, ggml_type))
    extra = {"blk.0.attn_q.scale": np.array([0.375], np.float32)}
    scaled = open_checkpoint(one_layer_gguf(tmp_path / "b.gguf", data, ggml_type, extra))
    assert torch.equal(scaled.weight(name).dequantize(), plain.weight(name).dequantize() * 0.375)
    assert torch.equal(scaled.read(f"{name}.weight"), scaled.weight(name).dequantize())
    assert f"{name}.scale" not in scaled.tensors
    assert scaled.info(f"{name}.weight").nbytes == data.size + 4
    several = {"blk.0.attn_q.scale": np.ones(3, np.float32)}
    with pytest.raises(InputError, match="has 3 scales; only one for all of it is supported"):
        open_checkpoint(one_layer_gguf(tmp_path / "c.gguf", data, ggml_type, several)).weight(name)


def block_bytes(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks of small bytes: every float16 in them is finite."""
    block_size, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.randint(0, 60, (rows, columns // block_size * size), dtype=np.uint8)


def one_layer_gguf(path: Path, data: np.ndarray, kind: Any, extra: dict[str, np.ndarray] | None = None) -> Path:
    """A file whose only matrix in a block is a q projection of two heads of 64 channels."""
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"block_count": 1, "context_length": 9, "embedding_length": 512, "feed_forward_length": 8}
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.attention.key_length", 64)
    writer.add_uint32("llama.attention.value_length", 64)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", np.ones((4, 512), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(**changes: float) -> tuple[np.ndarray, RopeSpec]:
    parameters = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = RopeSpec(500_000.0, "llama3", parameters | changes)
    plain = inverse_frequencies(RopeSpec(500_000.0), 64)[0]
    return (plain / inverse_frequencies(scaled, 64)[0]).numpy(), scaled


def minimal_gguf(
    path: Path, changes: dict[str, Any], tensors: dict[str, np.ndarray] | None = None, arch: str = "llama"
) -> Path:
    """A file with the metadata that a config needs and an embedding, of 64-channel heads."""
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "block_count": 1,
        "context_length": 1024,
        "embedding_length": 128,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500_000.0,
    }
    for key, value in (values | changes).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    for name, tensor in ({"token_embd.weight": np.ones((4, 128), np.float32)} | (tensors or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama3_rope_factors_become_the_scaling_they_came_from(tmp_path: Path) -> None:
    factors, expected = llama3_factors(factor=32.0)
    checkpoint = open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {}, {"rope_freqs.weight": factors}))
    assert checkpoint.spec.rope == expected
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_rope_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "a.gguf", {}, {"rope_freqs.weight": np.ones(32, np.float32)})
    assert open_checkpoint(path).spec.rope.kind == "default"


def test_rope_factors_of_no_known_rule_are_refused(tmp_path: Path) -> None:
    factors, _ = llama3_factors(low_freq_factor=2.0)
    with pytest.raises(InputError, match=r"a\.gguf: rope_freqs\.weight follows no known scaling"):
        open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {}, {"rope_freqs.weight": factors}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "none"}, None),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 256,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_keys_become_rope_scaling(keys: dict[str, Any], expected: object, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(minimal_gguf(tmp_path / "a.gguf", keys))
    assert checkpoint.config["rope_scaling"] == expected
    assert checkpoint.spec.rope.theta == 500_000


def test_head_counts_given_per_layer_must_agree(tmp_path: Path) -> None:
    same = open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {"attention.head_count_kv": [2, 2]}))
    assert same.spec.num_kv_heads == 2
    with pytest.raises(InputError, match=r"attention\.head_count_kv"):
        open_checkpoint(minimal_gguf(tmp_path / "b.gguf", {"attention.head_count_kv": [2, 1]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, r"llama\.block_count = None must be a positive integer"),
        ({"block_count": 0}, r"llama\.block_count = 0 must be a positive integer"),
        ({"embedding_length": "128"}, "embedding_length = '128' must be"),
        ({"embedding_length": 127}, "no multiple of the 2 heads"),
        ({"rope.dimension_count": 32}, r"rope\.dimension_count = 32 differs from the head size 64"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported; known are none, linear, yarn"),
        ({"rope.freq_base": float("nan")}, "must be a positive number"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon = None"),
    ],
)
def test_metadata_that_is_missing_or_odd_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(minimal_gguf(tmp_path / "a.gguf", changes))
    assert "a.gguf" in caught.value.message


def test_a_number_of_layers_beyond_the_tensors_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {"block_count": 2**32 - 1}))
    with pytest.raises(InputError, match="claims 4294967295 layers, and there are 1 tensors"):
        _ = checkpoint.spec


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'mamba' is not supported; known are llama, qwen2, qwen3"):
        open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {}, arch="mamba"))


def test_tensors_without_a_counterpart_keep_their_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(minimal_gguf(tmp_path / "a.gguf", {}, {"odd": np.ones(3, np.float32)}))
    assert checkpoint.read("odd").tolist() == [1, 1, 1]


def test_a_gguf_file_is_known_by_its_magic_too(tiny_gguf: Tiny, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(tiny_gguf("llama").read_bytes())
    assert isinstance(open_checkpoint(tmp_path / "model"), Checkpoint)
