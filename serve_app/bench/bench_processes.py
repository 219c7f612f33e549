"""Servers in processes of their own, whose CPU time a benchmark reads."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import uvloop

START_S = 120.0  # imports included
HOST = "127.0.0.1"
SERVER_PORTS = range(20_000, 32_768)  # above those of Ray's workers, below those of outgoing connections


def free_port() -> int:
    """Return a loopback port for a server that starts later.

    The system's own choice would be a port that an outgoing connection may take before the server listens.

    Raises:
        RuntimeError: all are in use.
    """
    for port in random.sample(SERVER_PORTS, len(SERVER_PORTS)):
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)):
                return port
    raise RuntimeError(f"no port from {SERVER_PORTS[0]} to {SERVER_PORTS[-1]} is free")


@dataclass(frozen=True)
class ServerProcess:
    """A running server: what its start returned, and its process."""

    started: Any
    pid: int

    def cpu_s(self) -> float:
        """Return the user and system CPU time of the process so far, of all its threads, to the nanosecond."""
        clock = (~self.pid << 3) | 2  # CPUCLOCK_SCHED of another process, see clock_getres(2)
        return time.clock_gettime(clock)


@contextmanager
def server_process(start: Callable[..., Awaitable[Any]], *arguments: Any) -> Iterator[ServerProcess]:
    """Run `start(*arguments)`, which returns once its server listens, in a new process with uvloop.

    Raises:
        RuntimeError: the server did not start.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(start, arguments, there), daemon=True)
    process.start()
    there.close()  # so that the end of the process is noticed here
    try:
        if not here.poll(START_S):
            raise RuntimeError(f"{start.__name__} did not start within {START_S:g} seconds")
        try:
            started = here.recv()
        except EOFError:
            raise RuntimeError(f"{start.__name__} failed: its error is above") from None
        assert process.pid is not None
        yield ServerProcess(started, process.pid)
    finally:
        process.kill()
        process.join()


def _run(start: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...], ready: Connection) -> None:
    async def forever() -> None:
        ready.send(await start(*arguments))
        await asyncio.Event().wait()

    uvloop.run(forever())
