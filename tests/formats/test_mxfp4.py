"""gpt-oss checkpoints: stacked experts, judged by transformers' own dequantization and its model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import Format, Part, Place, TensorHeader
from aphroquant.formats.mxfp4 import MXFP4, Mxfp4
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import DenseScheme, IntegerScheme, LookupScheme, Scheme

EXPERTS = "model.layers.0.mlp.experts"
MODULE = f"{EXPERTS}.1.down_proj"


def stored_stack(experts: int = 3, n: int = 4, k: int = 64) -> dict[str, Tensor]:
    return {
        "blocks": torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8),
        "scales": torch.randint(100, 140, (experts, n, k // 32), dtype=torch.uint8),
    }


def test_every_expert_is_what_transformers_dequantizes(reread: Callable[[Format], Format]) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    stack = stored_stack()
    theirs = mxfp4.convert_moe_packed_tensors(stack["blocks"], stack["scales"], dtype=torch.float32)  # [E, K, N]
    for expert in range(3):
        tensors = {name: tensor[expert] for name, tensor in stack.items()}
        weight = Mxfp4().read(MODULE, tensors)
        weight.check(MODULE)
        assert weight.scheme == MXFP4
        assert torch.equal(weight.dequantize(), theirs[expert].T)
        again = reread(Mxfp4()).write(MODULE, weight)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor)
            assert again[name].dtype == tensor.dtype


def test_an_expert_is_a_module_and_its_place_is_an_entry_of_the_stack() -> None:
    header = TensorHeader(torch.uint8, (3, 4, 2, 16))
    parts = Mxfp4().locate(f"{EXPERTS}.down_proj_blocks", header)
    assert parts == [Part(f"{EXPERTS}.{expert}.down_proj", "blocks", expert) for expert in range(3)]
    assert [Mxfp4().place(part.module, part.suffix) for part in parts] == [
        Place(f"{EXPERTS}.down_proj_blocks", expert) for expert in range(3)
    ]
    for name in (f"{EXPERTS}.down_proj_bias", "model.layers.0.mlp.router.weight"):
        (part,) = Mxfp4().locate(name, header)
        assert Mxfp4().place(part.module, part.suffix) == Place(name)


def tiny_model(path: Path) -> None:
    """A gpt-oss of two layers and three experts, with random blocks."""
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    GptOssForCausalLM(config).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        for suffix, tensor in stored_stack(experts, n, k).items():
            tensors[f"{name}_{suffix}"] = tensor - (14 if suffix == "scales" else 0)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(settings))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_read_expert_by_expert_and_transformers_loads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    quantized = {module: scheme for module, scheme in theirs.schemes().items() if scheme == MXFP4}
    expected = {
        f"model.layers.{i}.mlp.experts.{e}.{x}_proj" for i in (0, 1) for e in range(3) for x in ("gate_up", "down")
    }
    assert quantized.keys() == expected
    assert f"{EXPERTS}.down_proj_bias" in theirs.dense_names()
    assert not any(name.endswith(("_blocks", "_scales")) for name in theirs.dense_names())

    format = Mxfp4.for_schemes(theirs.schemes(), [])
    stacks: dict[str, list[Tensor]] = {}
    for module in quantized:
        for suffix, tensor in format.write(module, theirs.weight(module)).items():
            place = format.place(module, suffix)
            stacks.setdefault(place.name, []).append(tensor)
            assert place.entry == len(stacks[place.name]) - 1
    with CheckpointWriter(tmp_path / "ours") as writer:
        for name in theirs.dense_names():
            writer.add(name, theirs.read(name))
        for name, tensors in stacks.items():
            writer.add(name, torch.stack(tensors))
        writer.finish(theirs.config | {"quantization_config": format.quantization_config()})
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        assert torch.equal(ours.read(name), theirs.read(name)), name

    tokens = torch.arange(24).reshape(2, 12)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("theirs", "ours")]
    stored = dict(models[1].named_parameters())[f"{EXPERTS}.down_proj"][1]
    assert torch.equal(ours.weight(MODULE).dequantize(stored.dtype), stored.T)
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


@pytest.mark.parametrize("shape", [(3, 4, 2), (0, 4, 2, 16), (2**40, 1, 1, 16), (3, 4, 2, 16, 1), ()], ids=str)
def test_a_stack_of_another_shape_is_refused_before_its_experts_are_counted(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"down_proj_blocks has shape"):
        Mxfp4().locate(f"{EXPERTS}.down_proj_blocks", TensorHeader(torch.uint8, shape))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks", lambda t: t[..., :8], "must be"),
        ("blocks", lambda t: t[:0], "must be"),
        ("blocks", lambda t: t.int(), "blocks has dtype int32"),
        ("scales", lambda t: t[:, :1], r"scales has shape \[4, 1\]"),
        ("scales", lambda t: t.float(), "scales has dtype float32"),
    ],
)
def test_malformed_tensors_are_told_by_name(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = {key: tensor[0] for key, tensor in stored_stack().items()}
    with pytest.raises(InputError, match=message) as raised:
        Mxfp4().read(MODULE, {**tensors, name: change(tensors[name])})
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("name", ["blocks", "scales"])
def test_missing_tensors_are_told_by_name(name: str) -> None:
    tensors = {key: tensor[0] for key, tensor in stored_stack().items()}
    del tensors[name]
    with pytest.raises(InputError, match=f"the tensor {name} is missing"):
        Mxfp4().scheme(MODULE, headers_of(tensors))


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ({MODULE: IntegerScheme(4, 32, symmetric=True)}, "holds e2m1 g32 e8m0, not int4 sym g32"),
        ({MODULE: LookupScheme("e2m1", 16, "e4m3")}, "holds e2m1 g32 e8m0"),
        ({"model.layers.0.mlp.down_proj": MXFP4}, "holds experts of gpt-oss"),
        ({MODULE: MXFP4}, r"expert 0 of model\.layers\.0\.mlp\.experts\.down_proj is not quantized"),
        ({MODULE: MXFP4, f"{EXPERTS}.0.down_proj": DenseScheme(torch.bfloat16)}, "expert 0 of"),
    ],
)
def test_what_it_cannot_hold_is_refused(schemes: dict[str, Scheme], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Mxfp4.for_schemes(schemes, [])
