"""Signatures by a pair of keys, offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aphroquant.cli import run
from aphroquant.errors import GateError, InputError, UsageError
from aphroquant.provenance.signing import check_signature, sign

MISSING = "model-signing is not installed: pip install 'aphroquant[sign]'"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A fresh pair: private, public."""
    return make_keys(tmp_path / "key.pem")


def make_keys(path: Path) -> tuple[Path, Path]:
    pytest.importorskip("model_signing.signing", reason=MISSING, exc_type=ImportError)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, public = ec.generate_private_key(ec.SECP256R1()), path.with_suffix(".pub")
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path, public


def test_a_signed_output_is_verified_by_its_public_key(
    output: Path, gguf: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    for path in (output, gguf):
        assert run(["sign", str(path), "--private-key", str(private)]) == 0
        assert run(["verify", str(path), "--public-key", str(public)]) == 0
        assert "signature: by the owner of" in capsys.readouterr().out


def test_openssf_s_own_command_line_takes_the_signature(output: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    signature = sign(output, private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(output), "--signature", str(signature)]
    command += ["--public_key", str(public), "--ignore-paths", str(signature), "--allow_symlinks"]
    command += ["--ignore-paths", str(output / ".cache")]
    subprocess.run(command, check=True, capture_output=True)


def test_anybody_else_s_signature_or_another_file_is_found(
    output: Path, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    with pytest.raises(InputError, match=r"there is no signature model\.sig"):
        check_signature(output, public)
    sign(output, private)
    _, other = make_keys(tmp_path / "other.pem")
    with pytest.raises(GateError, match="the signature is by another key"):
        check_signature(output, other)
    (output / "extra.txt").write_text("surplus")
    with pytest.raises(GateError, match="the files are not those that were signed"):
        check_signature(output, public)
    assert run(["verify", str(output), "--public-key", str(public)]) == 4
    (output / "extra.txt").unlink()
    for damage in ("", "{}", "[]", '{"mediaType": 1}'):
        (output / "model.sig").write_text(damage)
        with pytest.raises(GateError, match="the signature is damaged"):
            check_signature(output, public)
    assert run(["verify", str(output), "--public-key", str(public)]) == 4
    assert "the signature is damaged" in capsys.readouterr().err


def test_keys_that_are_none_are_refused(output: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    for wrong in (public, output / "config.json", tmp_path / "missing"):
        with pytest.raises(InputError, match="is no private key that can be used"):
            sign(output, wrong)
    sign(output, private)
    for wrong in (private, output / "config.json", tmp_path / "missing"):
        with pytest.raises(InputError, match="is no public key that can be used"):
            check_signature(output, wrong)


def test_without_the_package_it_says_how_to_get_it(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    with pytest.raises(UsageError, match="need the package model-signing") as caught:
        sign(output, output / "key.pem")
    assert caught.value.hint == "pip install 'aphroquant[sign]'"
