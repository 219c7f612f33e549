"""A real fleet, three engines and two gateways, under traffic while its processes are killed and suspended at random.

`--long` injects many more faults than a normal run; the random seed is fixed.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import psutil
import pytest

from kvarn.v1 import inference_pb2
from serve_app.client import AsyncClient, Client
from serve_app.config import AppConfig
from tests.e2e.test_application import START_S, is_idle
from tests.support.live import deploy, engine_cores, free_port, ready, serving, wait_for

pytestmark = pytest.mark.timeout(3600)

APP = "kvarn"
ENGINES, GATEWAYS, WORKERS = 3, 2, 4
SHARED = [7 + i % 50 for i in range(260)]
PROMPTS = [[*SHARED, *(100 + 3 * number + i for i in range(20))] for number in range(6)]
TOKENS = 32
NEAR_TIE = 0.05  # nats: the rounding of another batch may reverse a smaller difference
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, "logprobs": 2}


@pytest.fixture(scope="module")
def address(shallow_model_dir: Any) -> Iterator[str]:
    port = free_port()
    config = AppConfig.model_validate(
        {
            "model": str(shallow_model_dir),
            "engine": {
                "num_replicas": ENGINES,
                "dtype": "float32",
                "kv_cache_memory_gib": 0.05,
                "max_model_len": 512,
                "max_num_seqs": 8,
                "max_num_batched_tokens": 512,
                "enforce_eager": True,
                "drain_grace_s": 20,
            },
            "gateway": {
                "num_replicas": GATEWAYS,
                "port": port,
                "http": {"port": free_port()},
                "drain_grace_s": 20,
                "routing": {"queue_timeout_s": 60, "silence_timeout_s": 5},
            },
        }
    )
    with serving(num_cpus=ENGINES):
        deploy(APP, config)
        with Client(f"127.0.0.1:{port}") as client:
            wait_for(lambda: len(ready(client)) == ENGINES, START_S)
        yield f"127.0.0.1:{port}"


@dataclass
class Traffic:
    """Requests of concurrent clients, and the errors in their answers."""

    reference: dict[int, list[int]]
    answers: int = 0
    resumed: int = 0
    errors: list[str] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self, address: str, seed: int) -> None:
        random = Random(seed)
        async with AsyncClient(address, retry_s=120) as client:
            while not self.stopped.is_set():
                number = random.randrange(len(PROMPTS))
                try:
                    await (self.stream if random.random() < 0.7 else self.once)(client, number)
                except Exception as error:
                    self.errors.append(f"prompt {number}: {error!r}")
                self.answers += 1

    async def stream(self, client: AsyncClient, number: int) -> None:
        deltas = [delta async for delta in client.generate(PROMPTS[number], **OPTIONS)]
        tokens = [token for delta in deltas for token in delta.token_ids]
        positions = [position for delta in deltas for position in delta.logprobs]
        self.resumed += bool(deltas[-1].resumptions)
        if deltas[-1].usage.completion_tokens != len(tokens):
            self.errors.append(f"prompt {number}: {deltas[-1].usage} but {len(tokens)} tokens received")
        self.check(number, tokens, positions)

    async def once(self, client: AsyncClient, number: int) -> None:
        answer = await client.generate_once(PROMPTS[number], **OPTIONS)
        self.check(number, list(answer.token_ids), list(answer.logprobs))

    def check(self, number: int, tokens: list[int], positions: list[inference_pb2.PositionLogprobs]) -> None:
        """Record an error unless the answer equals the reference, up to a first near tie of two tokens."""
        expected = self.reference[number]
        if len(tokens) != TOKENS or len(positions) != TOKENS:
            self.errors.append(
                f"prompt {number}: {len(tokens)} tokens and {len(positions)} log probabilities"
            )
            return
        at = next((i for i in range(TOKENS) if tokens[i] != expected[i]), None)
        if at is None:
            return
        likely = {candidate.token_id: candidate.logprob for candidate in positions[at].candidates}
        if likely.get(tokens[at], -99) - likely.get(expected[at], -99) > NEAR_TIE:
            self.errors.append(f"prompt {number}: differs at {at}: {tokens} instead of {expected}")


def replicas_of(deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas on this machine."""
    title = f"ServeReplica:{APP}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


async def kill_core(random: Random) -> None:
    replica = random.choice(replicas_of("Engine"))
    for process in engine_cores(replica.children()):
        process.kill()


async def kill_engine(random: Random) -> None:
    random.choice(replicas_of("Engine")).kill()


async def suspend_engine(random: Random) -> None:
    """Suspend an engine for longer than `silence_timeout_s`."""
    process = random.choice(replicas_of("Engine"))
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(8)
    process.send_signal(signal.SIGCONT)


async def kill_gateway(random: Random) -> None:
    random.choice(replicas_of("Gateway")).kill()


async def suspend_gateway(random: Random) -> None:
    process = random.choice(replicas_of("Gateway"))
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(2)
    process.send_signal(signal.SIGCONT)


FAULTS = (kill_core, kill_gateway, suspend_engine, kill_engine, suspend_gateway)


async def wait_until_recovered(address: str) -> None:
    """Wait for at least two ready engines and both gateways: the next fault must leave one of each."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with Client(address) as client:
            if len(replicas_of("Gateway")) == GATEWAYS and len(await asyncio.to_thread(ready, client)) >= 2:
                return
        await asyncio.sleep(0.5)
    raise AssertionError("the fleet did not recover")


async def test_no_token_is_lost_while_processes_die(address: str, long_mode: bool) -> None:
    min_faults = 60 if long_mode else len(FAULTS)
    random = Random(5)
    async with AsyncClient(address) as client:
        reference = {
            number: list((await client.generate_once(prompt, **OPTIONS)).token_ids)
            for number, prompt in enumerate(PROMPTS)
        }
    traffic = Traffic(reference)
    workers = [asyncio.create_task(traffic.work(address, seed)) for seed in range(WORKERS)]
    injected = 0
    # A fault may hit no open stream: inject more, up to three times as many, until one has been resumed.
    while injected < min_faults or (not traffic.resumed and injected < 3 * min_faults):
        await asyncio.sleep(random.uniform(1, 3))
        await FAULTS[injected % len(FAULTS)](random)
        injected += 1
        await wait_until_recovered(address)
    traffic.stopped.set()
    await asyncio.gather(*workers)
    assert Counter(traffic.errors) == {}
    assert traffic.answers > min_faults
    assert traffic.resumed > 0
    with Client(address) as client:
        await asyncio.to_thread(wait_for, lambda: len(ready(client)) == ENGINES, START_S)
        await asyncio.to_thread(wait_for, lambda: is_idle(client), 30)
