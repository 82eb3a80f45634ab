import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aphroquant.checkpoint import open_checkpoint
from aphroquant.errors import InputError
from aphroquant.schemes import DenseScheme

Tiny = Callable[..., Path]


@pytest.fixture
def sharded(tiny_checkpoint: Tiny, tmp_path: Path) -> Path:
    """A directory of several shards and an index, to damage."""
    return Path(shutil.copytree(tiny_checkpoint("llama", max_shard_size="100KB"), tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_equals_the_one_transformers_loads(family: str, tiny_checkpoint: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_checkpoint(family)
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(checkpoint.read(name), state[name]) for name in state)
    assert checkpoint.format_name == "dense"
    assert checkpoint.spec.family == family


def test_shards_with_an_index_are_one_checkpoint(sharded: Path, tiny_checkpoint: Tiny) -> None:
    whole = open_checkpoint(tiny_checkpoint("llama"))
    parts = open_checkpoint(sharded)
    assert len({info.file for info in parts.tensors.values()}) > 1
    assert parts.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(parts.read(name), whole.read(name)) for name in whole.tensors)
    assert parts.num_bytes == whole.num_bytes == sum(t.nbytes for t in map(whole.read, whole.tensors))


def test_shards_without_an_index_are_read_too(sharded: Path) -> None:
    names = open_checkpoint(sharded).tensors.keys()
    (sharded / "model.safetensors.index.json").unlink()
    assert open_checkpoint(sharded).tensors.keys() == names


def test_a_missing_shard_is_named_without_an_index_too(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=f"{victim.name} is missing"):
        open_checkpoint(sharded)


def test_an_index_that_names_a_missing_file_is_refused(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=f"the file {victim.name} is missing"):
        open_checkpoint(sharded)


def test_an_index_that_names_a_missing_tensor_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    edit_json(sharded / "model.safetensors.index.json", **index)
    with pytest.raises(InputError, match=r"promises model\.ghost\.weight"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 7])
def test_an_index_cannot_point_outside_its_directory(sharded: Path, file: object) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={"a": file})
    with pytest.raises(InputError, match=r"must be the name of a \.safetensors file in the same directory"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    name = next(iter(open_checkpoint(sharded).tensors))
    (sharded / "model.safetensors.index.json").unlink()
    safetensors.torch.save_file({name: torch.zeros(1)}, sharded / "zzz.safetensors")
    with pytest.raises(InputError, match=r"zzz\.safetensors: .* is also stored in"):
        open_checkpoint(sharded)


def test_pickles_are_refused_by_name_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pickles \(pytorch_model\.bin\)") as caught:
        open_checkpoint(tmp_path)
    assert "save_pretrained" in (caught.value.hint or "")
    with pytest.raises(InputError, match="is a pickle"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_a_directory_with_only_a_gguf_file_points_to_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"no \.safetensors files") as caught:
        open_checkpoint(tmp_path)
    assert "m.gguf" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' + "[" * 100_000])
def test_a_broken_config_is_named(text: str, sharded: Path) -> None:
    (sharded / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: (is not valid JSON|must hold)"):
        open_checkpoint(sharded)


def test_remote_code_and_quantization_are_taken_out_of_the_config(sharded: Path) -> None:
    edit_json(sharded / "config.json", auto_map={"AutoModel": "evil.Model"}, quantization_config={"quant_method": "x"})
    checkpoint = open_checkpoint(sharded)
    assert "auto_map" not in checkpoint.config
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.quantization_config == {"quant_method": "x"}


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_older_tools_quantization_files_are_found(file: str, method: str, sharded: Path) -> None:
    (sharded / file).write_text('{"bits": 4}')
    assert open_checkpoint(sharded).quantization_config == {"quant_method": method, "bits": 4}


def test_dense_modules_have_a_scheme_and_a_weight(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2"))
    schemes = checkpoint.schemes()
    expected = {"model.embed_tokens", "lm_head", *checkpoint.spec.modules()}
    assert schemes == dict.fromkeys(expected, DenseScheme(torch.float32))
    weight = checkpoint.weight("model.layers.1.mlp.down_proj")
    assert torch.equal(weight.dequantize(), checkpoint.read("model.layers.1.mlp.down_proj.weight"))
    assert set(checkpoint.dense_names()) == set(checkpoint.tensors)


def test_an_unknown_tensor_or_module_is_an_input_error(tiny_checkpoint: Tiny) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    with pytest.raises(InputError, match="no tensor 'nothing'"):
        checkpoint.read("nothing")
    with pytest.raises(InputError, match=r"module 'model\.norm'"):
        checkpoint.weight("model.norm")


def test_a_single_file_is_a_checkpoint_with_the_config_beside_it(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama") / "model.safetensors"
    assert open_checkpoint(path).spec.num_layers == 2
    shutil.copy(path, tmp_path)
    lone = open_checkpoint(tmp_path / "model.safetensors")
    assert lone.tensors
    with pytest.raises(InputError, match="what model its tensors are"):
        _ = lone.spec


def test_carried_files_are_the_tokenizer_and_its_like_and_never_code(sharded: Path) -> None:
    for name in ("LICENSE", "modeling_evil.py", "pytorch_model.bin", "README.md"):
        (sharded / name).write_text("x")
    assert {path.name for path in open_checkpoint(sharded).carried_files()} == {
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_tokenizer_is_transformers_own(tiny_checkpoint: Tiny) -> None:
    from transformers import AutoTokenizer

    path = tiny_checkpoint("llama")
    tokenizer = open_checkpoint(path).tokenizer()
    text = "Hello 123 \N{GRINNING FACE}<|im_end|>"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(path)(text).input_ids
    assert tokenizer.chat_template


def test_a_missing_or_broken_tokenizer_is_an_input_error(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        open_checkpoint(sharded).tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).unlink()
    with pytest.raises(InputError, match="there is no tokenizer"):
        open_checkpoint(sharded).tokenizer()


def test_tokenizer_code_of_a_checkpoint_is_never_run(sharded: Path, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (sharded / "evil.py").write_text(f"open({str(proof)!r}, 'w').write('x')\n")
    edit_json(sharded / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    edit_json(sharded / "config.json", auto_map={"AutoConfig": "evil.C"})
    try:
        open_checkpoint(sharded).tokenizer()
    except InputError as error:
        assert "tokenizer" in error.message  # refusing is as good as ignoring
    assert not proof.exists()


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.zeros(4, 8).to(torch.float8_e4m3fn), {"weight_scale_inv": torch.ones(1, 1)}),
        (torch.zeros(4, 8, dtype=torch.int8), {"SCB": torch.ones(4)}),
        (torch.zeros(4, 8, dtype=torch.uint8), {}),
    ],
)
def test_codes_that_no_config_explains_are_not_taken_for_numbers(
    weight: torch.Tensor, scale: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tensors = {"a.weight": weight, **{f"a.{name}": tensor for name, tensor in scale.items()}}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"a\.weight is .*, but config\.json does not say how it is quantized"):
        open_checkpoint(tmp_path).schemes()


def test_eight_bit_floats_without_a_scale_are_numbers(tmp_path: Path) -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    safetensors.torch.save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").weight("a").dequantize().eq(1).all()


def test_a_layer_that_has_lost_its_scale_is_not_taken_for_numbers(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match=r"a\.weight is float8_e4m3fn, but config\.json does not say"):
        open_checkpoint(tmp_path).schemes()


def test_a_module_that_is_stored_twice_is_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(8, 8), "a.qweight": torch.ones(1, 8, dtype=torch.int32)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(InputError, match=r"a is stored twice, as a\.weight and as a\.qweight"):
        open_checkpoint(tmp_path).schemes()


def test_a_link_to_nothing_is_told_as_one(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model"))
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("/nowhere/blob")
    with pytest.raises(
        InputError, match=r"model\.safetensors: is a link to /nowhere/blob, which is not there"
    ) as caught:
        open_checkpoint(path)
    assert "incomplete" in (caught.value.hint or "")
