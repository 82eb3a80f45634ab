"""Nothing of a checkpoint is run: no pickles, whatever they are called, and no Python files that its configs name."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import aphroquant
from aphroquant.checkpoint import open_checkpoint
from aphroquant.cli import run
from aphroquant.errors import InputError

TRAP = "import pathlib\npathlib.Path({path!r}).touch()\nclass Evil:\n    pass\n"


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def pickled(path: Path) -> bytes:
    return pickle.dumps(Bomb(path))


def zipped(path: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(path))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [pickled, zipped])
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.safetensors",
                                  "model.gguf"])  # fmt: skip
def test_a_pickle_is_refused_by_name_whatever_its_suffix(
    name: str, content: Callable[[Path], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content(tmp_path / "was-run"))
    assert run(["inspect", str(path)]) == 3
    words = capsys.readouterr().err.splitlines()
    assert words[0] == f"error: {path}: is a pickle, which can run code when loaded and is not read"
    assert words[1].startswith("hint: save the model again as safetensors")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_is_known(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps({"a": [1.0] * 100}, protocol))
    with pytest.raises(InputError, match="is a pickle"):
        open_checkpoint(path)


def test_a_directory_of_pickles_is_refused_by_the_name_of_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(pickled(tmp_path / "was-run"))
    with pytest.raises(InputError, match=r"the weights are pickles \(pytorch_model-00001-of-00002\.bin\)"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.fixture
def trapped(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A sound model whose configs name code for its every part, with that code beside them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), model)
    trap = TRAP.format(path=str(tmp_path / "was-run"))
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (model / name).write_text(trap)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    config["trust_remote_code"] = True
    (model / "config.json").write_text(json.dumps(config))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    settings["trust_remote_code"] = True
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.filterwarnings("ignore")
def test_auto_map_is_never_followed_nor_passed_on(trapped: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trapped)
    assert "auto_map" not in checkpoint.config
    assert len(checkpoint.tokenizer()) > 0
    result = aphroquant.convert(trapped, to="gptq", solver="gptq", samples=2, seq_len=16, out=tmp_path / "out")
    assert result.num_modules == 14
    assert not (tmp_path / "was-run").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_tokenizer_that_only_its_own_code_could_make_is_refused(trapped: Path, tmp_path: Path) -> None:
    settings = json.loads((trapped / "tokenizer_config.json").read_text())
    (trapped / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Evil"}))
    (trapped / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="the tokenizer cannot be loaded"):
        open_checkpoint(trapped).tokenizer()
    assert not (tmp_path / "was-run").exists()
