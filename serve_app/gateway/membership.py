"""The list of engine replicas, from Serve: the only file that uses its alpha request-router interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve_app.security.engine_access import Address

ROUTER_CLASS = f"{__name__}:ReplicaListRouter"


@dataclass(frozen=True)
class Endpoint:
    """One live engine replica: its id in Serve, the address of its gRPC server, its latest routing stats."""

    replica_id: str
    address: Address
    stats: dict[str, Any] = field(default_factory=dict, compare=False)


Listener = Callable[[list[Endpoint]], None]


class _Members:
    """The replica list and the listener of each deployment this process has a handle to."""

    def __init__(self) -> None:
        self._endpoints: dict[str, list[Endpoint]] = {}
        self._listeners: dict[str, Listener] = {}

    def publish(self, deployment: str, endpoints: list[Endpoint]) -> None:
        self._endpoints[deployment] = endpoints
        if deployment in self._listeners:
            self._listeners[deployment](endpoints)

    def listen(self, deployment: str, listener: Listener) -> None:
        self._listeners[deployment] = listener
        listener(self._endpoints.get(deployment, []))


members = _Members()


class ReplicaListRouter(FIFOMixin, RequestRouter):
    """Publishes Serve's replica list; it routes nothing, since requests do not go through Serve."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Publish the list; Serve calls this in the gateway's process when a replica or its routing stats change."""
        # Serve pickles this class by value: module state must be looked up where it runs.
        from serve_app.gateway.membership import endpoint, members

        super().update_replicas(replicas)
        members.publish(str(self._deployment_id), [endpoint(replica) for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Keep Serve's candidates: the only call through a handle is `wake`, which any replica may answer."""
        return [candidate_replicas]


def endpoint(replica: RunningReplica) -> Endpoint:
    """Read what a replica published through `record_replica_metadata` and `record_routing_stats`."""
    info = replica._replica_info
    address = Address(**info.replica_metadata)
    return Endpoint(replica.replica_id.unique_id, address, info.routing_stats)


def listen(handle: DeploymentHandle, listener: Listener) -> None:
    """Call `listener` in this event loop with the live replicas behind `handle`, now and after every change."""
    loop = asyncio.get_running_loop()
    members.listen(str(handle.deployment_id), lambda endpoints: _call_soon(loop, listener, endpoints))
    if not handle.is_initialized:
        handle._init()  # starts the router without waiting for a first request


def _call_soon(loop: asyncio.AbstractEventLoop, listener: Listener, endpoints: list[Endpoint]) -> None:
    """Call `listener` in `loop`: Serve runs routers in another thread."""
    loop.call_soon_threadsafe(listener, endpoints)
