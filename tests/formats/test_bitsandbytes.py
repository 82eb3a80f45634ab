"""bitsandbytes files: ours and the library's are the same bytes, and both load the other's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.base import Format, Part, TensorHeader
from aphroquant.formats.bitsandbytes import BitsAndBytes
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import ActivationScheme, DenseScheme, IntegerScheme, LookupScheme, QuantizedWeight, Scheme

MODULE = "model.layers.0.mlp.down_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = LookupScheme("nf4", 64, "float", flattened=True)
INT8 = IntegerScheme(8, None, symmetric=True)
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def library_tensors(weight: Tensor, **options: Any) -> dict[str, Tensor]:
    """What the library stores for a weight, by the names below the module."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, **options)
    return {"weight": packed} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}


def library_weight(tensors: dict[str, Tensor]) -> Tensor:
    """What the library makes of such tensors.

    As one long row: its CPU kernel (0.50.2) takes wrong scales if blocks cross rows, its CUDA kernels do not.
    """
    functional = pytest.importorskip("bitsandbytes.functional")
    parts = {name.removeprefix("weight."): value for name, value in tensors.items() if name != "weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    weight: Tensor = functional.dequantize_4bit(tensors["weight"], state).reshape(shape)
    return weight


def four_bit_tensors(n: int = 8, k: int = 64, *, nested: bool = False) -> dict[str, Tensor]:
    blocks = math.ceil(n * k / 64)
    scheme = LookupScheme("nf4", 64, "nested" if nested else "float", flattened=True)
    tensors = {"codes": torch.randint(0, 16, (n, k), dtype=torch.uint8), "scales": torch.rand(blocks)}
    if nested:
        tensors["scales"] = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        tensors["nested_table"] = torch.linspace(-1, 1, 256)
        tensors["nested_scales"] = torch.rand(math.ceil(blocks / 256))
        tensors["nested_offset"] = torch.tensor(0.5)
    format = BitsAndBytes.for_schemes({MODULE: scheme}, [])
    return format.write(MODULE, QuantizedWeight(scheme, tensors, (n, k)))


def read(tensors: dict[str, Tensor]) -> QuantizedWeight:
    return BitsAndBytes.from_config(FOUR_BITS).read(MODULE, tensors)


def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    return {**tensors, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("shape", [(8, 64), (7, 41), (3, 5), (150, 130)], ids=str)
def test_the_library_s_tensors_are_read_bit_for_bit_and_written_byte_for_byte(
    kind: str, nested: bool, block_size: int, shape: tuple[int, int], reread: Callable[[Format], Format]
) -> None:
    """Blocks cross rows in most of these shapes; an odd number of codes leaves half a byte."""
    dense = torch.randn(shape)
    tensors = library_tensors(dense, quant_type=kind, compress_statistics=nested, blocksize=block_size)
    weight = BitsAndBytes.from_config(FOUR_BITS | {"bnb_4bit_quant_type": kind}).read(MODULE, tensors)
    weight.check(MODULE)
    assert torch.equal(weight.dequantize(), library_weight(tensors))

    written = BitsAndBytes.for_schemes({MODULE: weight.scheme}, []).for_model(torch.float32, None)
    again = written.write(MODULE, weight)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        if shape == (3, 5) and name == f"weight.quant_state.bitsandbytes__{kind}":
            continue  # a single block may be called one of 32, 64, ... codes
        assert torch.equal(again[name], tensor), name
    assert torch.equal(reread(written).read(MODULE, again).dequantize(), weight.dequantize())
    assert torch.equal(library_weight(again), library_weight(tensors))


@pytest.mark.parametrize(
    ("source", "computes"), [("float32", "float32"), ("torch.float16", "float16"), ("float8", "bfloat16")]
)
def test_the_library_dequantizes_to_the_model_s_dtype_and_computes_in_the_source_s(source: str, computes: str) -> None:
    weight = read(library_tensors(torch.randn(8, 64), quant_type="nf4"))
    before = BitsAndBytes.from_config(FOUR_BITS | {"bnb_4bit_compute_dtype": source})
    written = BitsAndBytes.for_schemes({MODULE: weight.scheme}, []).for_model(torch.bfloat16, before)
    assert written.quantization_config()["bnb_4bit_compute_dtype"] == computes
    tensors = written.write(MODULE, weight)
    assert json.loads(bytes(tensors[STATE].tolist()))["dtype"] == "bfloat16"
    assert library_weight(tensors).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stored_as_floats_are_the_same_bytes(storage: torch.dtype) -> None:
    dense = torch.randn(8, 64)
    floats = library_tensors(dense, quant_type="nf4", quant_storage=storage)
    assert floats["weight"].dtype == storage
    assert torch.equal(read(floats).dequantize(), library_weight(library_tensors(dense, quant_type="nf4")))


def test_int8_rows_are_codes_times_their_maximum_over_127(reread: Callable[[Format], Format]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    dense = torch.randn(50, 24) * torch.logspace(-3, 3, 50)[:, None]
    codes, maxima, _ = functional.int8_vectorwise_quant(dense.half())
    tensors = {"weight": codes, "SCB": maxima.float(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    format = BitsAndBytes.for_schemes({MODULE: INT8}, [])
    weight = reread(format).read(MODULE, tensors)
    assert torch.equal(tensors["SCB"], tensors["SCB"].half().float())
    exact = codes.double() * tensors["SCB"].double()[:, None] / 127
    torch.testing.assert_close(weight.dequantize(torch.float64), exact, rtol=2**-24, atol=0)
    again = format.write(MODULE, weight)
    assert torch.equal(again["weight"], codes)
    assert torch.equal(reread(format).read(MODULE, again).dequantize(), weight.dequantize())
    assert torch.equal(again["SCB"], tensors["SCB"])


def test_half_precision_scales_of_other_formats_become_row_maxima_exactly() -> None:
    scales = torch.randn(64, 1).half()
    weight = QuantizedWeight(
        INT8, {"codes": torch.randint(0, 256, (64, 8), dtype=torch.uint8), "scales": scales}, (64, 8)
    )
    format = BitsAndBytes.for_schemes({MODULE: INT8}, [])
    assert torch.equal(format.read(MODULE, format.write(MODULE, weight)).dequantize(), weight.dequantize())


def test_a_scale_that_no_row_maximum_gives_is_refused() -> None:
    gap = next(
        scale
        for scale in torch.linspace(1.1, 1.9, 1000).unbind()
        if all(candidate / 127 != scale for candidate in neighbours((scale.double() * 127).float()))
    )
    tensors = {"codes": torch.zeros(1, 8, dtype=torch.uint8), "scales": gap.reshape(1, 1)}
    with pytest.raises(UsageError, match=r"scales\[0\] = .* is no float32 divided by 127"):
        BitsAndBytes.for_schemes({MODULE: INT8}, []).write(MODULE, QuantizedWeight(INT8, tensors, (1, 8)))


def neighbours(value: Tensor) -> list[Tensor]:
    return [value, value.nextafter(torch.tensor(0.0)), value.nextafter(torch.tensor(math.inf))]


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4 double", "fp4", "int8"],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_logits_from_its_own_files_and_from_ours(
    options: dict[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**options)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), quantization_config=config)
    quantized.save_pretrained(tmp_path / "theirs")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    theirs = open_checkpoint(tmp_path / "theirs")
    assert theirs.format_name == "bitsandbytes"
    assert sum(not isinstance(scheme, DenseScheme) for scheme in theirs.schemes().values()) == 14

    schemes = theirs.schemes()
    format = BitsAndBytes.for_schemes(schemes, [])
    with CheckpointWriter(tmp_path / "ours") as writer:
        for name in theirs.dense_names():
            writer.add(name, theirs.read(name))
        for module, scheme in schemes.items():
            if not isinstance(scheme, DenseScheme):
                for suffix, tensor in format.write(module, theirs.weight(module)).items():
                    writer.add(format.place(module, suffix).name, tensor)
        writer.finish(theirs.config | {"quantization_config": format.quantization_config()})
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.schemes() == schemes

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_stored_tensors_are_told_apart_by_their_names() -> None:
    format = BitsAndBytes.from_config(FOUR_BITS)
    header = TensorHeader(torch.uint8, (1,))
    for suffix in ("weight", "weight.absmax", "weight.nested_quant_map", STATE, "bias"):
        assert format.locate(f"{MODULE}.{suffix}", header) == [Part(MODULE, suffix)]
        assert format.place(MODULE, suffix).name == f"{MODULE}.{suffix}"
    with pytest.raises(InputError, match="belongs to no layer"):
        format.locate("experts.gate_up_proj.quant_state.bitsandbytes__nf4", header)


def test_dense_modules_stay_dense() -> None:
    dense = {"weight": TensorHeader(torch.bfloat16, (4, 4))}
    assert BitsAndBytes.from_config(FOUR_BITS).scheme("lm_head", dense) is None


@pytest.mark.parametrize("config", [{}, {"load_in_4bit": True, "load_in_8bit": True}, {"load_in_4bit": "yes"}])
def test_a_config_that_says_neither_4_nor_8_bits_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="load_in_4bit"):
        BitsAndBytes.from_config(config)


def test_another_four_bit_type_is_refused() -> None:
    with pytest.raises(InputError, match="bnb_4bit_quant_type 'af4'"):
        BitsAndBytes.from_config(FOUR_BITS | {"bnb_4bit_quant_type": "af4"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda t: t[:-1], r"but weight has 255 bytes"),
        ("weight", lambda t: t.long(), "weight has dtype int64"),
        ("weight.absmax", lambda t: t[:-1], "weight.absmax has 7 scales, which fit no block size"),
        ("weight.absmax", lambda t: t[:, None], r"weight.absmax has shape \[8, 1\]"),
        ("weight.absmax", lambda t: t[:0], "weight.absmax has 0 scales"),
        ("weight.absmax", lambda t: t.byte(), "weight.absmax has dtype uint8"),
        ("weight.quant_map", lambda t: t + 0.01, "weight.quant_map is not the table of nf4"),
        ("weight.quant_map", lambda t: t * math.nan, "weight.quant_map is not the table of nf4"),
        ("weight.quant_map", lambda t: t[:8], r"weight.quant_map has shape \[8\]"),
        (STATE, lambda t: t[:-1], "is not valid JSON"),
        (STATE, lambda t: t[None], "must be the bytes of a JSON object"),
        (STATE, lambda t: torch.zeros(5000, dtype=torch.uint8), "at most 4096"),
        (STATE, lambda t: torch.full((4000,), ord("["), dtype=torch.uint8), "is not valid JSON"),
        (STATE, lambda t: torch.tensor([0xFF, 0xFE], dtype=torch.uint8), "is not valid JSON"),
        (STATE, lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8), "must be a JSON object, not list"),
    ],
)
def test_malformed_tensors_are_told_by_name(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = four_bit_tensors()
    with pytest.raises(InputError, match=message) as raised:
        read({**tensors, name: change(tensors[name])})
    assert MODULE in str(raised.value)


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.quant_map", STATE])
def test_missing_tensors_are_told_by_name(name: str) -> None:
    tensors = four_bit_tensors()
    del tensors[name]
    with pytest.raises(InputError, match=name):
        BitsAndBytes.from_config(FOUR_BITS).scheme(MODULE, headers_of(tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2**62, 2**62]},
        {"shape": [8, -64]},
        {"shape": [8.0, 64]},
        {"shape": [8, 64, 1]},
        {"shape": None},
        {"shape": [8, 63]},
        pytest.param({"shape": [10**400, 1]}, id="a shape of 400 digits"),
        {"blocksize": 0},
        {"blocksize": 63},
        {"blocksize": 64.0},
        {"blocksize": 128},
        {"blocksize": "64"},
        {"blocksize": [64]},
        {"quant_type": "fp4"},
        {"quant_type": {}},
    ],
    ids=str,
)
def test_an_absurd_state_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=MODULE):
        read(with_state(four_bit_tensors(), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"nested_offset": math.nan},
        {"nested_offset": math.inf},
        pytest.param({"nested_offset": 10**400}, id="an offset of 400 digits"),
        {"nested_offset": True},
        {"nested_offset": None},
        {"nested_blocksize": 128},
        {"nested_dtype": "float16"},
    ],
    ids=str,
)
def test_an_absurd_nested_state_is_refused(changes: dict[str, Any]) -> None:
    tensors = four_bit_tensors(nested=True)
    assert read(tensors).scheme == LookupScheme("nf4", 64, "nested", flattened=True)
    with pytest.raises(InputError, match=MODULE):
        read(with_state(tensors, **changes))


@pytest.mark.parametrize("name", ["weight.nested_absmax", "weight.nested_quant_map"])
def test_malformed_nested_scales_are_refused(name: str) -> None:
    tensors = four_bit_tensors(nested=True)
    with pytest.raises(InputError, match=name):
        read({**tensors, name: torch.rand(7)})


def test_int8_needs_its_row_maxima_and_row_order() -> None:
    format = BitsAndBytes.from_config({"load_in_8bit": True})
    codes = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(InputError, match="the tensor SCB is missing"):
        format.scheme(MODULE, headers_of({"weight": codes}))
    with pytest.raises(InputError, match=r"SCB has shape \[3\]"):
        format.read(MODULE, {"weight": codes, "SCB": torch.ones(3)})
    with pytest.raises(InputError, match="weight_format is not 0"):
        format.read(MODULE, {"weight": codes, "SCB": torch.ones(4), "weight_format": torch.tensor(1)})


@pytest.mark.parametrize(
    "scheme",
    [
        LookupScheme("e2m1", 32, "e8m0"),
        LookupScheme("nf4", 64, "float"),
        LookupScheme("nf4", 48, "float", flattened=True),
        LookupScheme("nf4", 64, "float", flattened=True, activations=ActivationScheme("int")),
        IntegerScheme(8, 128, symmetric=True),
        IntegerScheme(8, None, symmetric=False),
        IntegerScheme(8, None, symmetric=True, activations=ActivationScheme("int")),
    ],
    ids=str,
)
def test_schemes_that_it_cannot_hold_are_refused(scheme: Scheme) -> None:
    with pytest.raises(UsageError, match=f"{MODULE}: bitsandbytes"):
        BitsAndBytes.for_schemes({MODULE: scheme}, [])


def test_one_checkpoint_has_one_scheme() -> None:
    with pytest.raises(UsageError, match="one scheme for all modules"):
        BitsAndBytes.for_schemes({MODULE: NF4, "model.layers.1.mlp.up_proj": INT8}, [])


def test_dense_names_that_a_reader_would_take_for_more_are_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot leave model\.layers\.0\.mlp\.gate dense"):
        BitsAndBytes.for_schemes({"model.layers.0.mlp.gate_proj": NF4}, ["model.layers.0.mlp.gate"])


def test_a_quantized_head_is_not_left_to_readers_who_skip_it_by_default() -> None:
    scheme = LookupScheme("nf4", 64, "float", flattened=True)
    config = BitsAndBytes.for_schemes({MODULE: scheme, "lm_head": scheme}, []).quantization_config()
    assert config["llm_int8_skip_modules"] == []
