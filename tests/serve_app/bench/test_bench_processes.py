"""Ports of servers that a benchmark starts."""

from __future__ import annotations

import socket

import pytest

from serve_app.bench import bench_processes
from serve_app.bench.bench_processes import HOST, free_port


def test_a_port_in_use_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(bench_processes, "SERVER_PORTS", [port])
        with pytest.raises(RuntimeError, match=f"no port from {port} to {port} is free"):
            free_port()
    assert free_port() == port
