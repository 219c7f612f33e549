"""The process that owns the Ray of `kvarn serve`: it runs until its standard input ends, and leaves nothing behind.

It is the leader of its own session, so that signals to the group of `kvarn serve`, such as from a terminal or from
timeout(1), reach no process of Ray: replicas finish their streams first. The end of its input also comes when
`kvarn serve` is killed.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import psutil

from kvarn.worker import answer, take_standard_output

LOOPBACK = "127.0.0.1"
POLL_S = 0.2
PR_SET_CHILD_SUBREAPER = 36  # option of Linux's prctl(2)
GRACE_S = 5.0  # for processes to exit by themselves
KILL_ROUNDS = 2  # killed processes may leave orphans, which need a moment to clean up
SHUTDOWN_TIMEOUT_S = 45.0  # of Serve, which gives replicas half a minute to finish their streams, and of Ray
# Of this process, once it has started Ray. If Ray hangs while it starts, this process is killed after that time.
STOP_TIMEOUT_S = SHUTDOWN_TIMEOUT_S + (1 + KILL_ROUNDS) * GRACE_S + 5
OBJECT_STORE_BYTES = 128 << 20  # small: requests travel over gRPC, not through Ray's object store
# By default Ray runs workers at niceness 15: beside any other work, engines would get a small share of the CPUs.
SYSTEM_CONFIG = {"worker_niceness": 0}
CORE_PROCESSES = ("gcs_server", "raylet")


def start() -> subprocess.Popen[str]:
    """Start this module in a process; it answers with one line of JSON, {"url", "needs_token"} or {"error"}."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that `end_descendants` finds them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(grace_s: float = GRACE_S) -> None:
    """Kill the descendants that do not exit by themselves within `grace_s` seconds."""
    for wait_s in (grace_s, *[GRACE_S] * KILL_ROUNDS):
        _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=wait_s)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> None:
    """Run Ray until the standard input ends or a signal asks for it."""
    answers = take_standard_output()
    adopt_orphans()
    try:
        dashboard = _start_ray()
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # on SIGTERM, a starting Ray exits
        answer(answers, {"error": str(error)})
        has_stopped = False
    else:
        _on_signals(signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            answer(answers, dashboard)
            sys.stdin.read()
        _on_signals(signal.SIG_IGN)
        has_stopped = _stop_ray()
    end_descendants(GRACE_S if has_stopped else 0)
    os._exit(0)  # Ray's exit handlers would wait for a GCS that is gone


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _start_ray() -> dict[str, object]:
    """Start Ray; return the URL of its dashboard and whether it requires a token."""
    # Ray reads these on import. Without the first, a single-node cluster listens on every interface.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    context = ray.init(
        address="local",
        _node_ip_address=LOOPBACK,
        dashboard_host=LOOPBACK,
        include_dashboard=True,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config=SYSTEM_CONFIG,
    )
    # By default, `ray.init` creates a token and sets the mode in its own environment only.
    needs_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    return {"url": f"http://{context.dashboard_url}", "needs_token": needs_token}


def _stop_ray() -> bool:
    """Let replicas finish, and stop Ray; return False once its core is gone, as after a signal to every process."""
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it reports that no application runs
    deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S
    return _finishes(serve.shutdown, deadline_s, while_=_core_runs) and _finishes(ray.shutdown, deadline_s)


def _finishes(
    call: Callable[[], object], deadline_s: float, while_: Callable[[], bool] = lambda: True
) -> bool:
    """Whether `call` returns before the deadline and while `while_` holds.

    It runs in a thread, since Ray's client waits for a minute for a GCS that is gone, and then aborts the process.
    """

    def run() -> None:
        with suppress(Exception):  # what it fails to stop is killed
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < deadline_s and while_():
        thread.join(POLL_S)
    return not thread.is_alive()


def _core_runs() -> bool:
    """Whether Ray's GCS and raylet run."""
    alive = set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child.name())
    return alive.issuperset(CORE_PROCESSES)


if __name__ == "__main__":
    main()
