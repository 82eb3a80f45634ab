"""Hugging Face Hub ids: the files of a checkpoint in the local Hub cache, downloaded where there is a network."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

from aphroquant.checkpoint.carried import CARRIED_PATTERNS
from aphroquant.errors import InputError, ResourceError

_ALLOWED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md", *CARRIED_PATTERNS]


class HubPlace(NamedTuple):
    """A repository of the Hub, and the commit of it."""

    repository: str
    revision: str


def hub_place(path: Path) -> HubPlace | None:
    """What a directory in the Hub cache, or a file in it, is a copy of: models--ORG--NAME/snapshots/COMMIT."""
    for folder in (path.absolute(), *path.absolute().parents):
        cached = folder.parent.parent
        if folder.parent.name == "snapshots" and cached.name.startswith("models--"):
            return HubPlace(cached.name.removeprefix("models--").replace("--", "/", 1), folder.name)
    return None


def download(repository: str, revision: str | None, *, alternative: Path | None = None) -> Path:
    """The directory of a snapshot of `repository`, from the cache or the Hub. `alternative` is a path to suggest."""
    from huggingface_hub import errors as hub_errors
    from huggingface_hub import snapshot_download

    where = repository if revision is None else f"{repository} at revision {revision}"
    suggestion = f"did you mean the path {alternative}? " if alternative else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_ALLOWED))
    except hub_errors.GatedRepoError as error:
        hint = "accept its licence on huggingface.co, then run: hf auth login"
        raise InputError(f"{where}: access to this Hub repository is restricted", hint=hint) from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(f"{where}: there is no such revision on the Hugging Face Hub") from error
    except hub_errors.RepositoryNotFoundError as error:
        hint = f"{suggestion}check the name; a private repository needs: hf auth login"
        raise InputError(f"{where}: there is no such path, and no such Hub repository", hint=hint) from error
    except Exception as error:  # the HTTP library behind huggingface_hub, and so its errors, differ by version
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ResourceError(f"{where}: the disk is full while downloading") from error
        hint = f"{suggestion}check the network, or download the model elsewhere and give its directory"
        message = f"{where}: there is no such path, and the Hugging Face Hub did not give it ({type(error).__name__})"
        raise InputError(message, hint=hint) from error
