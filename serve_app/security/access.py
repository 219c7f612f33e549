"""Authentication of calls: headers to a `Caller`, the same for gRPC metadata and HTTP."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from serve_app.request.request_errors import AuthenticationError, BadRequestError, counting_rejections
from serve_app.routing import Caller
from serve_app.rpc.channels import PRIORITY_KEY, SESSION_KEY, TENANT_KEY
from serve_app.security.api_keys import ApiKey, KeyFile, read_keys
from serve_app.security.rate_limits import RateLimits
from serve_app.security.reloaded_files import Reloaded

MAX_TENANT_CHARACTERS = 128
API_KEY = "x-api-key"  # the header of Anthropic's clients
NO_KEY = "An API key is required: send the header `authorization: Bearer KEY` or `x-api-key: KEY`."

Headers = Mapping[str, str]


class Access:
    """Authenticates callers and applies the rate limits of their API keys.

    With API keys, a call's tenant and priority are those of its key; `x-kvarn-priority` can only lower the
    priority. Without, both come from the headers `x-kvarn-tenant` and `x-kvarn-priority`. `x-session-id` names a
    session of the tenant's.

    Args:
        api_keys: the file of keys, read again when it changes; None lets everyone in.
        on_rejection: called with the reason of each rejection.

    Raises:
        KeyFileError: the file is not valid.
    """

    def __init__(
        self, api_keys: Path | None = None, on_rejection: Callable[[str], None] = lambda reason: None
    ) -> None:
        self._keys: Reloaded[KeyFile] | None = None
        if api_keys is not None:
            self._keys = Reloaded([api_keys], lambda: read_keys(api_keys))
        self._limits = RateLimits()
        self._on_rejection = on_rejection

    async def check(self, headers: Headers) -> None:
        """Reject a call without a valid key, by the newest version of the file.

        Raises:
            AuthenticationError: with the sentence for the caller.
        """
        with counting_rejections(self._on_rejection):
            if self._keys is not None:
                _authenticate(await self._keys.fresh(), headers)

    @contextmanager
    def admitted(self, headers: Headers, generations: int = 1) -> Iterator[Caller]:
        """Authenticate a call, and count it against its key's limits for the duration of the block.

        Args:
            headers: the call's headers, by lower-case name.
            generations: number of requests the call counts as.

        Raises:
            AuthenticationError, RateLimitError, BadRequestError: with the sentence for the caller.
        """
        with ExitStack() as held:
            with counting_rejections(self._on_rejection):
                caller = self._admit(headers, generations, held)
            yield caller

    def _admit(self, headers: Headers, generations: int, held: ExitStack) -> Caller:
        key = self._key(headers)
        priority, session = _priority(headers), headers.get(SESSION_KEY, "")
        if key is None:
            return Caller(_tenant(headers), priority or 0, session)
        held.enter_context(self._limits.admitted(key, generations))
        priority = key.priority if priority is None else max(key.priority, priority)
        return Caller(key.tenant, priority, session)

    def _key(self, headers: Headers) -> ApiKey | None:
        if self._keys is None:
            return None
        return _authenticate(self._keys.loaded, headers)


def _authenticate(keys: KeyFile, headers: Headers) -> ApiKey:
    authorization = headers.get("authorization", "")
    if not authorization and (key := headers.get(API_KEY)):
        return keys.authenticate(key)
    return keys.authenticate(_presented(authorization))


def _presented(authorization: str) -> str:
    """Return the key in an authorization header: a bearer token, or the password of basic authentication."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer" and credentials:
        return credentials.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            raise AuthenticationError(NO_KEY) from None
    raise AuthenticationError(NO_KEY)


def _tenant(headers: Headers) -> str:
    tenant = headers.get(TENANT_KEY, "")
    if len(tenant) > MAX_TENANT_CHARACTERS:
        raise BadRequestError(
            f"{TENANT_KEY} must have at most {MAX_TENANT_CHARACTERS} characters, got {len(tenant)}."
        )
    return tenant


def _priority(headers: Headers) -> int | None:
    given = headers.get(PRIORITY_KEY)
    if given is None:
        return None
    if not re.fullmatch(r"-?\d{1,9}", given, re.ASCII):
        raise BadRequestError(f"{PRIORITY_KEY} must be an integer of at most 9 digits, got {given[:20]!r}.")
    return int(given)
