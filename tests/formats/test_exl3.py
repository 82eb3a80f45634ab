"""EXL3 files, judged by what exllamav3's own CUDA kernels make of the same tensors (data/make_exl3.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aphroquant.checkpoint import CheckpointWriter, open_checkpoint
from aphroquant.errors import InputError, UsageError
from aphroquant.formats.exl3 import MARKERS, Exl3
from aphroquant.formats.reading import headers_of
from aphroquant.schemes import IntegerScheme, QuantizedWeight, TrellisScheme

DATA = Path(__file__).parent / "data"
JUDGED: dict[str, Any] = json.loads((DATA / "exl3.json").read_text())
IN, OUT = JUDGED["in_features"], JUDGED["out_features"]
HALF_TOLERANCE = 1e-3  # of the largest weight: the kernels rotate in float16
FLOAT_TOLERANCE = 1e-3  # the library's own error measure is of scales before they are float16
CONFIG = {"quant_method": "exl3", "version": "1.6.5", "bits": 3.5, "head_bits": 6}
P = "model.layers.0.mlp.up_proj"


def raw(seed: int, count: int) -> np.ndarray:
    return np.random.PCG64(seed).random_raw(count)


def random_scales(seed: int, count: int) -> Tensor:
    return torch.from_numpy(((raw(seed, count) % 4001).astype(np.float64) - 2000) / 1024).half()


def random_tensors(codebook: str, bits: float, seed: int) -> dict[str, Tensor]:
    """The tensors that the kernels were given."""
    shape = (IN // 16, OUT // 16, int(16 * bits))
    count = int(np.prod(shape))
    trellis = torch.from_numpy(raw(seed, (count + 3) // 4).view(np.int16)[:count].copy().reshape(shape))
    tensors = {"trellis": trellis, "suh": random_scales(seed + 100, IN), "svh": random_scales(seed + 200, OUT)}
    if codebook in MARKERS:
        tensors[codebook] = torch.tensor(MARKERS[codebook], dtype=torch.uint32).view(torch.int32)
    return tensors


def tensors_of(case: str) -> dict[str, Tensor]:
    codebook, bits = case.split()
    return random_tensors(codebook, float(bits), JUDGED["random"][case]["seed"])


def read(tensors: dict[str, Tensor]) -> QuantizedWeight:
    weight = Exl3.from_config(CONFIG).read(P, tensors)
    weight.check(P)
    return weight


@pytest.mark.parametrize("case", JUDGED["random"])
def test_the_librarys_kernel_decodes_the_same_numbers_bit_for_bit(case: str) -> None:
    weight = read(tensors_of(case))
    assert isinstance(weight.scheme, TrellisScheme)
    assert str(weight.scheme) == "trellis {1}-bit {0}".format(*case.split())
    rotated = weight.scheme.rotated(weight["rings"])
    assert rotated[0, :4].tolist() == JUDGED["random"][case]["rotated_start"]
    assert hashlib.sha256(rotated.numpy().tobytes()).hexdigest() == JUDGED["random"][case]["rotated_sha256"]


@pytest.mark.parametrize("case", JUDGED["random"])
def test_the_librarys_kernel_makes_the_same_weight_within_half_precision(case: str) -> None:
    ours = read(tensors_of(case)).dequantize(torch.float64)  # [N, K]
    assert ours.shape == (OUT, IN)
    for row, start in ((5, 0), (77, 3)):
        theirs = torch.tensor(JUDGED["random"][case][f"row_{row}"], dtype=torch.float64)
        error = float((ours[start::16, row] - theirs).abs().max() / ours.abs().max())
        assert error < HALF_TOLERANCE, error


@pytest.mark.parametrize("case", JUDGED["quantized"])
def test_a_matrix_that_the_library_quantized_comes_back_with_the_error_it_measured(case: str) -> None:
    stored = load_file(DATA / "exl3.safetensors")
    tensors = {name.partition("/")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{case}/")}
    weight = read(tensors).dequantize(torch.float64).T  # [K, N]
    numbers = raw(5, IN * OUT).view(np.uint16).reshape(-1, 4).astype(np.float64).sum(1)
    original = torch.from_numpy(((numbers - 131070) / 37837 / 50).reshape(IN, OUT)).float().double()
    error = float((weight - original).square().sum() / original.square().sum())
    assert error == pytest.approx(JUDGED["quantized"][case]["relative_error"], rel=FLOAT_TOLERANCE)
    theirs = torch.tensor(JUDGED["quantized"][case]["row_9"], dtype=torch.float64)
    assert torch.allclose(weight[9, ::16], theirs, rtol=0, atol=FLOAT_TOLERANCE * float(weight.abs().max()))


@pytest.mark.parametrize("case", ["3inst 3", "mcg 8", "mul1 1.5"])
def test_written_tensors_are_the_stored_ones_byte_for_byte(case: str) -> None:
    tensors = tensors_of(case)
    weight = read(tensors)
    written = Exl3.for_schemes({P: weight.scheme}, []).write(P, weight)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_is_read_from_disk(tmp_path: Path) -> None:
    tensors = tensors_of("mcg 4")
    with CheckpointWriter(tmp_path / "model") as writer:
        for name, tensor in tensors.items():
            writer.add(f"{P}.{name}", tensor)
        writer.add("model.norm.weight", torch.ones(8))
        writer.finish({"model_type": "llama", "quantization_config": CONFIG})
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.format_name == "exl3"
    assert checkpoint.schemes() == {P: TrellisScheme(4, "mcg")}
    assert torch.equal(checkpoint.weight(P).dequantize(), read(tensors).dequantize())


def test_older_files_have_signs_as_bits() -> None:
    tensors = tensors_of("3inst 2")
    signs = torch.from_numpy(raw(1, IN) % 2 * 2).float() - 1
    bits = (signs < 0).view(-1, 16).long() << torch.arange(16)
    older = {**tensors, "su": bits.sum(1).to(torch.int16)}
    del older["suh"]
    assert torch.equal(read(older).dequantize(), read({**tensors, "suh": signs.half()}).dequantize())


def test_the_layers_of_a_checkpoint_may_differ_in_width() -> None:
    narrow, wide = read(tensors_of("mul1 2.5")).scheme, read(tensors_of("mul1 4")).scheme
    written = Exl3.for_schemes({"a": narrow, "b": wide, "lm_head": wide}, [])
    config = {"quant_method": "exl3", "version": "1.6.5", "bits": 3.25, "head_bits": 4, "codebook": "mul1"}
    assert written.quantization_config() == config


def test_a_codebook_that_the_config_names_and_a_layer_has_lost_is_told() -> None:
    tensors = tensors_of("mcg 4")
    del tensors["mcg"]
    with pytest.raises(InputError, match="has no mcg, although quantization_config says that this is its codebook"):
        Exl3.from_config(CONFIG | {"codebook": "mcg"}).read(P, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trellis": torch.zeros(8, 16, 40, dtype=torch.int16)},
            r"trellis has shape \[8, 16, 40\]: bits = 2.5 must be",
        ),
        ({"trellis": torch.zeros(8, 16, 144, dtype=torch.int16)}, "bits = 9.0 must be"),
        ({"trellis": torch.zeros(8, 256, dtype=torch.int16)}, "must be .K/16, N/16, 16"),
        ({"trellis": torch.zeros(0, 16, 32, dtype=torch.int16)}, "must be .K/16, N/16, 16"),
        ({"trellis": torch.zeros(8, 16, 32, dtype=torch.int32)}, "trellis has dtype int32"),
        ({"suh": torch.ones(64).half()}, "suh has shape .64."),
        ({"svh": torch.ones(256)}, "svh has dtype float32"),
        ({"svh": None}, "the tensor sv is missing"),
        ({"mcg": torch.tensor(0, dtype=torch.int32)}, "mcg = 0x0 is an unknown codebook; 0xcbac1fed is known"),
        ({"mcg": torch.zeros(2, dtype=torch.int32)}, "mcg has shape .2., but must be one integer"),
        ({"mcg": torch.tensor(1.0)}, "must be one integer"),
        ({"mcg": torch.tensor(0), "mul1": torch.tensor(0)}, "both mcg and mul1"),
    ],
)
def test_contradicting_tensors_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**tensors_of("3inst 2"), **changes}.items() if tensor is not None}
    with pytest.raises(InputError, match=message):
        read(tensors)


def test_widths_that_no_rotation_fits_are_refused() -> None:
    tensors = {"trellis": torch.zeros(7, 16, 32, dtype=torch.int16), "suh": torch.ones(112).half()}
    tensors["svh"] = torch.ones(256).half()
    with pytest.raises(InputError, match="no multiple of trellis 2-bit 3inst's 128 channels"):
        Exl3.from_config({}).scheme(P, headers_of(tensors))


@pytest.mark.parametrize("value", [0, -1, 17, "4", True, float("nan"), [4], 10**400])
def test_an_impossible_number_of_bits_in_the_config_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="quantization_config: bits = "):
        Exl3.from_config({"bits": value})


def test_other_schemes_cannot_be_written() -> None:
    with pytest.raises(UsageError, match="exl3 holds trellis codes, not"):
        Exl3.for_schemes({P: IntegerScheme(4, 128, symmetric=True)}, [])


def test_the_codebooks_are_centred_and_of_the_published_widths() -> None:
    """QTIP's numbers: the 3INST sums have a deviation of 1.2437, the sums of bytes of 1."""
    for codebook, deviation in (("3inst", 1.2437), ("mcg", 1.2437), ("mul1", 1.0)):
        rings = torch.from_numpy(raw(9, 128 * 256).view(np.int32).copy())[: 8 * 16 * 64].view(8, 16, 64)
        numbers = TrellisScheme(8, codebook).rotated(rings).double()
        assert float(numbers.mean()) == pytest.approx(0, abs=0.02)
        assert float(numbers.std()) == pytest.approx(deviation, rel=0.01)
