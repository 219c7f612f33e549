"""Waiting until the shared store holds a prompt that an engine computed for another one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvarn.vllm.store.block_files import BlockFiles

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

POLL_INTERVAL_S = 0.005
STALLED_S = 1.0  # without another block, after which the store takes no more


class HandOver:
    """Prompts that one engine computes for others.

    Args:
        directory: the shared store's.
        ranks: tensor-parallel ranks of the engine.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self._directory = directory
        self._ranks = ranks

    def ask(self, params: SamplingParams) -> None:
        """Have the engine say under which names it stores the prompt."""
        asked: dict[str, Any] = {"kv_transfer_params": {"do_remote_decode": True}}
        params.extra_args = {**(params.extra_args or {}), **asked}

    async def wait(self, output: RequestOutput) -> int:
        """Wait until the store holds the whole tiles of the prompt of a finished request, or takes no more.

        Returns:
            How many of the leading ones it holds.
        """
        stored = output.kv_transfer_params
        if not stored:
            return 0
        files = BlockFiles(self._directory, stored["kind"], self._ranks, capacity_bytes=0)
        progress_s = time.monotonic()
        for place, name in enumerate(stored["names"]):
            while not files.holds(name):
                if time.monotonic() - progress_s > STALLED_S:
                    return place
                await asyncio.sleep(POLL_INTERVAL_S)
            progress_s = time.monotonic()
        return len(stored["names"])
