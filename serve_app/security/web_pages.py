"""Protection from web pages in a browser that can reach a gateway, where no API keys are required."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from serve_app.config import is_loopback
from serve_app.request.request_errors import ForbiddenError

MAX_SHOWN_CHARACTERS = 128
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class _Authority(NamedTuple):
    """Host and port of a URL; the port is "" for the default one."""

    host: str
    port: str


class WebPages:
    """Rejects HTTP calls that a browser makes for a web page of somebody else.

    A page whose name was rebound to the gateway's address (DNS rebinding) sends its own name as `Host`; any other
    page sends its origin as `Origin`.

    Args:
        own_names: further names of the gateway, or "*" for any.
        origins: origins of pages that may call, or "*" for any.
    """

    def __init__(self, own_names: Collection[str], origins: Collection[str]) -> None:
        self._own_names = {name.lower() for name in (socket.gethostname(), *own_names)}
        self._origins = origins

    def check(self, headers: Mapping[str, str]) -> None:
        """Reject a call by its `Host` and `Origin`; clients other than browsers need not send them.

        Raises:
            ForbiddenError: with the sentence for the caller.
        """
        host = headers.get("host")
        if host is not None and not self._is_own(host):
            raise ForbiddenError(
                f"The host {_shown(host)} is not known as this gateway's: add it to gateway.security.allowed_hosts, "
                "or use an IP address or localhost."
            )
        origin = headers.get("origin")
        if origin is not None and not self._may_call(origin, host or ""):
            raise ForbiddenError(
                f"Web pages of the origin {_shown(origin)} may not call this gateway: add it to "
                "gateway.cors_origins."
            )

    def _is_own(self, host: str) -> bool:
        if "*" in self._own_names:
            return True
        authority = _parsed(host)
        return authority is not None and (
            _is_local(authority.host) or _is_ip(authority.host) or authority.host in self._own_names
        )

    def _may_call(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        scheme, _, rest = origin.partition("://")
        authority = _parsed(rest, scheme)
        return authority is not None and (_is_local(authority.host) or authority == _parsed(host, scheme))


def _parsed(authority: str, scheme: str = "") -> _Authority | None:
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        return None
    host, port = found[1].lower().removesuffix("."), found[2] or ""
    return _Authority(host, "" if port == _DEFAULT_PORTS.get(scheme) else port)


def _is_local(host: str) -> bool:
    """Whether browsers resolve `host` to this machine without DNS."""
    return is_loopback(host) or host.endswith(".localhost")


def _is_ip(host: str) -> bool:
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _shown(value: str) -> str:
    return repr(value[:MAX_SHOWN_CHARACTERS])
