"""What requests inside an engine wait for, by the names that metrics, the console and `kvarn status` use."""

from __future__ import annotations

from kvarn.v1 import cache_pb2
from serve_app.routing import CacheLoad


def waiting_for(load: CacheLoad | cache_pb2.CacheLoad) -> dict[str, int]:
    """Waiting requests by what they lack; all others of `load.waiting_requests` wait for their turn."""
    return {
        "slots": load.waiting_for_slots,
        "blocks": load.waiting_for_blocks,
        "prefix": load.waiting_for_prefix,
    }
