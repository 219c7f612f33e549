"""What tests of a running application share: a port, waiting, and a look at the replicas."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from kvarn.v1 import cluster_pb2
from serve_app.client import Client, UnavailableError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], timeout_s: float, poll_s: float = 0.05) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(poll_s)


def ready(client: Client) -> set[str]:
    """Ids of the replicas that take requests; empty while no gateway answers."""
    try:
        replicas = client.cache_state().replicas
    except UnavailableError:
        return set()
    return {r.replica_id for r in replicas if r.status == cluster_pb2.REPLICA_STATUS_READY}
