"""API keys, stored as hashes in a file and compared in constant time.

A key has the form `kvarn-ID-SECRET`. For each ID, the file holds the SHA-256 of the whole key. The secret has
256 random bits, so a slow password hash would add nothing.
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
from functools import cached_property
from pathlib import Path
from typing import Annotated, Self

import yaml
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from kvarn.errors import KVarNError, finding_message
from serve_app.config import StrictSettings
from serve_app.request.request_errors import AuthenticationError

PREFIX = "kvarn"
ID_BYTES = 6
SECRET_BYTES = 32
_NO_HASH = "0" * 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast, where PyYAML has it


def _without_spaces(name: str) -> str:
    if not all("!" <= character <= "~" for character in name):
        raise ValueError("give printable ASCII without spaces")
    return name


Name = Annotated[str, StringConstraints(min_length=1, max_length=128), AfterValidator(_without_spaces)]


class KeyFileError(KVarNError, ValueError):
    """The file of API keys cannot be used; the message says what to change."""


class ApiKey(StrictSettings):
    """One entry of the key file."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the whole key, in hexadecimal")
    tenant: Name = Field(description="tenant of the key's requests")
    priority: int = Field(default=0, ge=-(2**29), le=2**29, description="lower values are served first")
    requests_per_minute: float | None = Field(
        default=None,
        gt=0,
        description="long-term rate of requested outputs per gateway; None: no limit",
    )
    burst: int = Field(default=10, ge=1, description="outputs that may be requested at once")
    max_concurrent: int | None = Field(
        default=None,
        ge=1,
        description="outputs generated concurrently per gateway; None: no limit",
    )


class KeyFile(StrictSettings):
    """Contents of the key file."""

    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        ids = [key.id for key in self.keys]
        if len(ids) != len(set(ids)):
            raise ValueError("every key needs a unique id")
        return self

    @cached_property
    def _by_id(self) -> dict[str, ApiKey]:
        return {key.id: key for key in self.keys}

    def authenticate(self, presented: str) -> ApiKey:
        """Return the entry of the presented key, in a time that does not depend on any secret.

        Raises:
            AuthenticationError: no entry matches.
        """
        parts = presented.split("-")
        named = self._by_id.get(parts[1] if len(parts) == 3 else "")
        expected = named.sha256 if named else _NO_HASH
        if not hmac.compare_digest(_hash(presented), expected) or named is None:
            raise AuthenticationError("The API key is unknown: check it, or request a new one.")
        return named


def read_keys(path: Path) -> KeyFile:
    """Read and validate a key file.

    Raises:
        KeyFileError: the file cannot be read or is not valid.
    """
    try:
        return KeyFile.model_validate(yaml.load(path.read_text(), _LOADER) or {})
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise KeyFileError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "content"
        raise KeyFileError(f"{path}: {place}: {finding_message(problem)}") from None


def create_key(path: Path, tenant: str, **limits: object) -> tuple[str, ApiKey]:
    """Add a new key to a file, created if missing; return the key, which is not stored, and its entry.

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
        raise KeyFileError(f"{option} is {problem['input']!r}: {finding_message(problem)}") from None
    with _changing(path) as file:
        held = read_keys(file) if file.exists() else KeyFile()
        _write(file, KeyFile(keys=(*held.keys, key)))
    return presented, key


def revoke_key(path: Path, identifier: str) -> None:
    """Remove a key from a file.

    Raises:
        KeyFileError: the file is not valid, or does not hold that key.
    """
    with _changing(path) as file:
        held = read_keys(file)
        left = tuple(key for key in held.keys if key.id != identifier)
        if len(left) == len(held.keys):
            raise KeyFileError(
                f"{path} holds no key with id {identifier!r}: list them with `kvarn keys list`"
            )
        _write(file, KeyFile(keys=left))


def _hash(presented: str) -> str:
    return hashlib.sha256(presented.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Yield the file behind any symbolic links, locked so that one process at a time reads and replaces it.

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
    except RuntimeError as error:  # a loop of symbolic links
        raise KeyFileError(f"{path} cannot be written: {error}") from None


def _write(file: Path, keys: KeyFile) -> None:
    """Replace the file atomically and with the same permissions: a server reads the old or the new keys."""
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
    """Copy owner and mode of `file`, if it exists, to the open file that will replace it."""
    if file.exists():
        held = file.stat()
        os.fchown(descriptor, held.st_uid, held.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(held.st_mode))
