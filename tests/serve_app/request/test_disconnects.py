"""A block that a client's disconnect cancels, and nothing else of its task."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from serve_app.request.disconnects import UntilDisconnect


class Client:
    """A client whose `receive` yields what the test puts into `messages`."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self) -> Message:
        return await self.messages.get()

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})


async def test_a_client_that_stays_changes_nothing() -> None:
    with UntilDisconnect(Client().receive):
        await asyncio.sleep(0)
    with pytest.raises(KeyError), UntilDisconnect(Client().receive):
        raise KeyError


async def test_a_client_that_leaves_ends_the_block_and_not_the_task() -> None:
    client, reached = Client(), []
    client.messages.put_nowait({"type": "http.request"})
    client.leave()
    with UntilDisconnect(client.receive):
        await asyncio.Event().wait()
        reached.append("the end of the block")
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert (reached, task.cancelling()) == ([], 0)


async def test_an_error_while_the_client_leaves_is_raised() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError

    client = Client()
    client.leave()
    with pytest.raises(KeyError), UntilDisconnect(client.receive):
        await fail_when_cancelled()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_task_that_is_cancelled_stays_cancelled(leaves: bool) -> None:
    client, begun = Client(), asyncio.Event()

    async def work() -> None:
        with UntilDisconnect(client.receive):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    if leaves:
        client.leave()
        await asyncio.sleep(0)  # the watcher wakes up, and cancels as well
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
