"""Signatures of an output by the OpenSSF's model-signing, with a pair of keys: no service and no network is needed.

The signature holds the hash of every file, so that it proves more than check sums do: who made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aphroquant.errors import GateError, InputError, UsageError
from aphroquant.provenance.records import OutputRecord

if TYPE_CHECKING:
    from types import ModuleType

_NOT_SIGNED = (".cache",)  # what downloading a repository leaves
_MAKE_KEYS = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"


def sign(path: str | Path, private_key: str | Path, *, password: str | None = None) -> Path:
    """Sign a directory or a single file, and return where the signature is: model.sig in it, or FILE.sig beside it.

    What is changed afterwards, the model card included, no longer fits the signature.
    """
    record = _record(path)
    signing, hashing = _module("signing"), _module("hashing")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=private_key, password=password)
    except (OSError, ValueError, TypeError) as error:
        raise _key_error(private_key, "private", error) from error
    try:
        signer.set_hashing_config(_hashing(hashing, record)).sign(record.path, record.signature_path)
    except OSError as error:
        raise InputError(f"{record.path}: cannot be signed: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{record.path}: cannot be signed: {error}") from error
    return record.signature_path


def check_signature(path: str | Path, public_key: str | Path) -> None:
    """GateError unless the signature is by the owner of this key, and of these files."""
    record = _record(path)
    if not record.signature_path.is_file():
        raise InputError(
            f"{record.path}: there is no signature {record.signature_path.name}",
            hint="leave out --public-key, or sign it: aphroquant sign",
        )
    verifying = _module("verifying")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError) as error:
        raise _key_error(public_key, "public", error) from error
    try:
        verifier.verify(record.path, record.signature_path)
    except Exception as error:  # a signature of any content reaches JSON, protobuf and cryptography
        raise GateError(f"{record.signature_path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "Key mismatch" in text:
        return "the signature is by another key"
    if "Signature mismatch" in text:
        return "the files are not those that were signed"
    return f"the signature is damaged ({type(error).__name__})"


def _record(path: str | Path) -> OutputRecord:
    record = OutputRecord(Path(path).expanduser())
    if not record.path.exists():
        raise InputError(f"{path}: no such file or directory")
    return record


def _hashing(hashing: ModuleType, record: OutputRecord) -> Any:
    """Links are followed, as they are in the Hub's cache; the signature itself is left out."""
    ignored = [record.signature_path.name, *_NOT_SIGNED] if record.path.is_dir() else []
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=True).set_allow_symlinks(True)


def _module(name: str) -> ModuleType:
    """One of the package's modules. UsageError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise UsageError(
            f"signatures need the package model-signing, which cannot be imported: {error}",
            hint="pip install 'aphroquant[sign]'",
        ) from error


def _key_error(path: str | Path, kind: str, error: Exception) -> InputError:
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error).partition(". See ")[0]
    return InputError(f"{path}: is no {kind} key that can be used: {reason}", hint=f"a pair is made by: {_MAKE_KEYS}")
