"""Judges and makers for the formats: an unpacker that reads bit by bit, and random canonical weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from aphroquant.formats.base import Format
from aphroquant.schemes import IntegerScheme, QuantizedWeight

Unpacker = Callable[[Mapping[str, Any], Mapping[str, torch.Tensor]], np.ndarray]
WeightMaker = Callable[..., QuantizedWeight]


@pytest.fixture(scope="session")
def unpacked() -> Unpacker:
    """`unpacked(quantization_config, tensors)`: the float32 weight [N, K] of a stored layer, read one bit at a time."""
    return _unpacked


@pytest.fixture(scope="session")
def integer_weight() -> WeightMaker:
    """`integer_weight(scheme, n, k, seed=0, dtype=torch.float16)`: a random weight with zero points 0 and 2**b - 1."""
    return _integer_weight


@pytest.fixture(scope="session")
def reread() -> Callable[[Format], Format]:
    """The format as a reader meets it: made from the `quantization_config` in config.json."""
    return lambda written: type(written).from_config(json.loads(json.dumps(written.quantization_config())))


def _integer_weight(
    scheme: IntegerScheme, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    random = torch.Generator().manual_seed(seed)
    groups, limit = scheme.num_groups(k), 2**scheme.bits
    tensors = {
        "codes": torch.randint(0, limit, (n, k), generator=random, dtype=torch.uint8),
        "scales": torch.randn(n, groups, generator=random).mul(0.01).to(dtype),
    }
    if not scheme.symmetric:
        zeros = torch.randint(0, limit, (n, groups), generator=random, dtype=torch.uint8)
        zeros.view(-1)[0], zeros.view(-1)[-1] = 0, limit - 1
        tensors["zeros"] = zeros
    if scheme.act_order:
        order = torch.randperm(k, generator=random)
        tensors["group_index"] = (order // scheme.group_size).to(torch.int32)
    return QuantizedWeight(scheme, tensors, (n, k))


def _field(words: np.ndarray, start: int, bits: int) -> int:
    """The unsigned number in bits start .. start + bits - 1 of 32-bit words laid end to end."""
    value = 0
    for j in range(bits):
        word, place = divmod(start + j, 32)
        value |= ((int(words[word]) >> place) & 1) << j
    return value


def _unpacked(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    method = config["quant_method"]
    if method == "awq":
        return _unpacked_awq(config, arrays)
    if method == "gptq":
        return _unpacked_gptq(config, arrays)
    assert method == "compressed-tensors"
    return _unpacked_compressed_tensors(config, arrays)


def _unpacked_awq(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    qweight, scales = arrays["qweight"], arrays["scales"]
    k_size, n_size = qweight.shape[0], qweight.shape[1] * 8
    group = config["group_size"] if config["group_size"] > 0 else k_size
    nibble = {column: i for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
    weight = np.empty((n_size, k_size), np.float32)
    for n in range(n_size):
        shift = 4 * nibble[n % 8]
        for k in range(k_size):
            code = (int(qweight[k, n // 8]) >> shift) & 15
            zero = (int(arrays["qzeros"][k // group, n // 8]) >> shift) & 15
            weight[n, k] = np.float32(code - zero) * np.float32(scales[k // group, n])
    return weight


def _unpacked_gptq(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    qweight, qzeros, bits = arrays["qweight"], arrays["qzeros"], config["bits"]
    k_size, n_size = qweight.shape[0] * 32 // bits, qweight.shape[1]
    weight = np.empty((n_size, k_size), np.float32)
    for n in range(n_size):
        for k in range(k_size):
            group = arrays["g_idx"][k]
            code, zero = _field(qweight[:, n], k * bits, bits), _field(qzeros[group], n * bits, bits)
            if config["checkpoint_format"] == "gptq":
                zero = (zero + 1) % 2**bits
            weight[n, k] = np.float32(code - zero) * np.float32(arrays["scales"][group, n])
    return weight


def _unpacked_compressed_tensors(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    (group,) = config["config_groups"].values()
    arguments = group["weights"]
    bits, half = arguments["num_bits"], 2 ** (arguments["num_bits"] - 1)
    n_size, k_size = arrays["weight_shape"]
    weight = np.empty((n_size, k_size), np.float32)
    for n in range(n_size):
        for k in range(k_size):
            g = k // arguments.get("group_size", k_size)
            code = _field(arrays["weight_packed"][n], k * bits, bits) - half
            zero = 0
            if not arguments["symmetric"]:
                zero = _field(arrays["weight_zero_point"][:, g], n * bits, bits) - half
            weight[n, k] = np.float32(code - zero) * np.float32(arrays["weight_scale"][n, g])
    return weight
