"""Which replica served each session last."""

from __future__ import annotations

from collections import OrderedDict

from xxhash import xxh3_64_intdigest

from serve_app.routing.types import Caller

MAX_SESSIONS = 1 << 16
MAX_SESSIONS_PER_TENANT = 1 << 14


class SessionHomes:
    """The replica that served each session last, for a bounded number of sessions.

    Each tenant has its own sessions, and forgets its own least recent one beyond `per_tenant`. Beyond `total`, the
    tenant that has been idle for longest forgets its least recent one.
    """

    def __init__(self, total: int = MAX_SESSIONS, per_tenant: int = MAX_SESSIONS_PER_TENANT) -> None:
        self._total = total
        self._per_tenant = per_tenant
        self._tenants: OrderedDict[str, OrderedDict[int, str]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, caller: Caller) -> str | None:
        """Return the replica that served the caller's session last; None without a session, or if it is unknown."""
        sessions = self._tenants.get(caller.tenant) if caller.session else None
        return sessions.get(_key(caller.session)) if sessions else None

    def remember(self, caller: Caller, replica_id: str) -> None:
        """Record that the replica serves the caller's session, if it has one."""
        if not caller.session:
            return
        sessions = self._tenants.setdefault(caller.tenant, OrderedDict())
        self._tenants.move_to_end(caller.tenant)
        key = _key(caller.session)
        self._count += key not in sessions
        sessions[key] = replica_id
        sessions.move_to_end(key)
        if len(sessions) > self._per_tenant:
            self._forget(caller.tenant)
        elif self._count > self._total:
            self._forget(next(iter(self._tenants)))

    def _forget(self, tenant: str) -> None:
        sessions = self._tenants[tenant]
        sessions.popitem(last=False)
        self._count -= 1
        if not sessions:
            del self._tenants[tenant]


def _key(session: str) -> int:
    return xxh3_64_intdigest(session.encode())
