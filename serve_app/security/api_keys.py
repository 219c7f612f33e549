"""API keys: made once, kept as hashes in a file, checked in constant time.

A key reads `kvarn-ID-SECRET`. The file holds, for each ID, the SHA-256 of the whole key: a key is 256 random bits, so
that a slow password hash would add nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from kvarn.errors import KVarNError
from serve_app.config import StrictSettings
from serve_app.request.errors import AuthenticationError

PREFIX = "kvarn"
ID_BYTES = 6
SECRET_BYTES = 32
_NO_HASH = "0" * 64


def _without_spaces(name: str) -> str:
    if not all("!" <= character <= "~" for character in name):
        raise ValueError("give printable ASCII without spaces")
    return name


Name = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_without_spaces)]


class KeyFileError(KVarNError, ValueError):
    """The file of API keys cannot be used; the message says what to change."""


class ApiKey(StrictSettings):
    """One key, as the file holds it."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the whole key, in hexadecimal")
    tenant: Name = Field(description="whose requests these are")
    priority: int = Field(default=0, ge=-(2**29), le=2**29, description="lower goes first")
    requests_per_minute: float | None = Field(
        default=None,
        gt=0,
        description="outputs asked for, in the long run, at each gateway; None: no limit",
    )
    burst: int = Field(default=10, ge=1, description="outputs that may be asked for at once")
    max_concurrent: int | None = Field(
        default=None,
        ge=1,
        description="outputs generated at once at each gateway; None: no limit",
    )


class KeyFile(StrictSettings):
    """All keys."""

    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        ids = [key.id for key in self.keys]
        if len(ids) != len(set(ids)):
            raise ValueError("every key needs an id of its own")
        return self

    def authenticate(self, presented: str) -> ApiKey:
        """The entry of a key.

        Raises:
            AuthenticationError: it is none of these. How long that takes tells nothing of a secret.
        """
        parts = presented.split("-")
        named = {key.id: key for key in self.keys}.get(parts[1] if len(parts) == 3 else "")
        expected = named.sha256 if named else _NO_HASH
        if not hmac.compare_digest(_hash(presented), expected) or named is None:
            raise AuthenticationError("The API key is not known here: check it, or ask for a new one.")
        return named


def read_keys(path: Path) -> KeyFile:
    """Reads a file of keys.

    Raises:
        KeyFileError: it cannot be read, or is no file of keys.
    """
    try:
        return KeyFile.model_validate(yaml.safe_load(path.read_text()) or {})
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise KeyFileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "its content"
        raise KeyFileError(f"{path}: {place}: {_message(problem)}") from None


def create_key(path: Path, tenant: str, **limits: object) -> tuple[str, ApiKey]:
    """Adds a key to a file, which is made if missing; returns the key, which is kept nowhere, and its entry.

    Raises:
        KeyFileError: the file or the settings of the key are not valid.
    """
    identifier = secrets.token_hex(ID_BYTES)
    presented = f"{PREFIX}-{identifier}-{secrets.token_hex(SECRET_BYTES)}"
    try:
        key = ApiKey.model_validate(
            {"id": identifier, "sha256": _hash(presented), "tenant": tenant, **limits}
        )
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{problem['loc'][0]}".replace("_", "-")
        raise KeyFileError(f"{option} is {problem['input']!r}: {_message(problem)}") from None
    with _changing(path) as file:
        held = read_keys(file) if file.exists() else KeyFile()
        _write(file, KeyFile(keys=(*held.keys, key)))
    return presented, key


def revoke_key(path: Path, identifier: str) -> None:
    """Removes a key from a file.

    Raises:
        KeyFileError: the file is not valid, or does not hold that key.
    """
    with _changing(path) as file:
        held = read_keys(file)
        left = tuple(key for key in held.keys if key.id != identifier)
        if len(left) == len(held.keys):
            raise KeyFileError(f"{path} holds no key of id {identifier!r}: `kvarn keys list` shows them")
        _write(file, KeyFile(keys=left))


def _message(problem: ErrorDetails) -> str:
    return problem["msg"].removeprefix("Value error, ")


def _hash(presented: str) -> str:
    return hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """The file behind any symbolic links, for one process at a time to read and replace.

    Raises:
        KeyFileError: it cannot be written.
    """
    try:
        file = path.resolve()
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)  # the file itself is replaced
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(directory)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
    except RuntimeError as error:  # links that lead in a circle
        raise KeyFileError(f"{path} cannot be written: {error}") from None


def _write(file: Path, keys: KeyFile) -> None:
    """Replaces the file in one step: a server that reads it sees the old or the new keys, and still may read it."""
    text = yaml.safe_dump(keys.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(descriptor, "w") as written:
            _keep_permissions(descriptor, file)
            written.write(text)
        os.replace(scratch, file)
    except OSError:
        os.unlink(scratch)
        raise


def _keep_permissions(descriptor: int, file: Path) -> None:
    """Give an open file the owner and the mode of one that it will replace, if that exists."""
    if file.exists():
        held = file.stat()
        os.fchown(descriptor, held.st_uid, held.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(held.st_mode))
