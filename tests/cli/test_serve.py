"""aphroquant serve: what its options mean, and how it ends when it cannot start."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from aphroquant.cli import run
from aphroquant.engine.types import EngineConfig
from aphroquant.server.settings import ServerSettings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`served(*arguments)`: the configurations that `aphroquant serve` would start with."""
    monkeypatch.delenv("APHROQUANT_API_KEY", raising=False)
    calls: list[tuple[EngineConfig, ServerSettings]] = []
    monkeypatch.setattr(
        "aphroquant.server.serving.serve", lambda config, settings, announce: calls.append((config, settings))
    )

    def serve(*arguments: str) -> tuple[EngineConfig, ServerSettings]:
        assert run(["serve", *arguments]) == 0
        return calls.pop()

    return serve


def test_the_defaults_are_those_of_the_engine_and_of_a_private_server(served: Any) -> None:
    config, settings = served("model")
    assert config == EngineConfig(model="model")
    assert settings == ServerSettings(log_level="info")
    assert (settings.host, settings.port) == ("127.0.0.1", 2242)


def test_every_option_reaches_its_setting(served: Any) -> None:
    config, settings = served(
        "model", "--host", "0.0.0.0", "--port", "0", "--api-key", "a", "--api-key", "b", "--served-model-name", "m",
        "--kv-cache-dtype", "int8_per_token_head", "--kv-cache-memory", "1.5GiB", "--max-model-len", "100",
        "--max-num-seqs", "5", "--max-num-batched-tokens", "64", "--max-open", "9", "--num-threads", "1",
        "--backend", "cpu", "--activations", "float", "--no-prefix-caching", "--log-level", "error",
        "--device", "cpu", "--dtype", "float16", "--gpu-memory-utilization", "0.5",
    )  # fmt: skip
    assert config == EngineConfig(
        model="model", kv_cache_dtype="int8_per_token_head", kv_cache_memory=3 * 2**29, max_model_len=100,
        max_num_seqs=5, max_num_batched_tokens=64, num_threads=1, backend="cpu", activations="float",
        enable_prefix_caching=False, device="cpu", dtype="float16", gpu_memory_utilization=0.5,
    )  # fmt: skip
    assert settings == ServerSettings(
        host="0.0.0.0", port=0, api_keys=("a", "b"), served_model_name="m", max_open=9, log_level="error"
    )


@pytest.mark.parametrize(
    ("written", "number"),
    [("1000", 1000), ("10k", 10_000), ("2KiB", 2048), ("3 MB", 3_000_000), ("1gi", 2**30), ("0.5GiB", 2**29)],
)
def test_memory_may_have_a_unit(served: Any, written: str, number: int) -> None:
    assert served("model", "--kv-cache-memory", written)[0].kv_cache_memory == number


@pytest.mark.parametrize("written", ["", "many", "-1", "1TB", "1.2.3"])
def test_other_amounts_of_memory_are_refused(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "model", "--kv-cache-memory", written]) == 2
    assert "is not an amount of bytes; write bytes, 512MiB or 4GB" in capsys.readouterr().err


def test_keys_may_come_from_the_environment(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APHROQUANT_API_KEY", "one two")
    assert served("model")[1].api_keys == ("one", "two")
    assert served("model", "--api-key", "three")[1].api_keys == ("three",)


@pytest.mark.parametrize("key", ["", " ", "kéy", "a b"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "model", "--api-key", key]) == 2
    assert "an API key must be non-empty printable ASCII without spaces" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_with_3(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path / "none"), "--port", "0"]) == 3
    assert "none: no such file or directory" in capsys.readouterr().err


def test_a_taken_port_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "model", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error
    assert "hint: choose another --port; --port 0 takes any free one" in error


def test_the_name_of_a_directory_is_the_models_name(tmp_path: Any) -> None:
    assert ServerSettings().model_name(str(tmp_path)) == tmp_path.name
    assert ServerSettings().model_name("org/model") == "org/model"
    assert ServerSettings(served_model_name="mine").model_name("org/model") == "mine"
