"""Requests of a session, through the dispatcher: where they go, and what ExplainRoute says of it."""

from __future__ import annotations

import time

import pytest

from kvarn.v1 import cluster_pb2, inference_pb2
from serve_app.request.request_errors import BadRequestError
from serve_app.routing import Caller, Router
from tests.serve_app.gateway.test_admission_queue import Replica, gateway_of, state

REPLICAS = ("one", "two", "three")


def prompt(first: int) -> inference_pb2.Prompt:
    """Return token ids that share no prefix with those of another `first`."""
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=range(first, first + 256)))


@pytest.mark.parametrize("is_in_header", [False, True])
async def test_a_session_goes_where_it_was_served_and_explain_shows_it(is_in_header: bool) -> None:
    router = Router("gateway")
    for replica_id in REPLICAS:
        router.update(replica_id, state(1, 100), time.monotonic())
    dispatcher = gateway_of(Replica(router, rejections=0))
    chosen: dict[str, str] = {}
    for number in range(24):
        name = f"session {number}"
        caller = Caller("tenant", session=name if is_in_header else "")
        body_name = "ignored" if is_in_header else name  # the header counts first
        for first in (1000 * number, 1000 * number + 500):
            request = inference_pb2.GenerateRequest(prompt=prompt(first), session_id=body_name)
            request.sampling_params.max_tokens = 1
            (answer,) = [response async for response in dispatcher.generate(request, None, caller)]
            assert answer.replica_id == chosen.setdefault(name, answer.replica_id)
        asked = cluster_pb2.ExplainRouteRequest(prompt=prompt(30_000), session_id=body_name)
        explained = await dispatcher.explain(asked, caller)
        assert explained.chosen_replica_id == chosen[name]
        discounted = [one.replica_id for one in explained.candidates if one.session_s < 0]
        assert discounted == [chosen[name]]
        for stranger in (Caller("tenant"), Caller("another", session=name)):
            other = await dispatcher.explain(cluster_pb2.ExplainRouteRequest(prompt=prompt(30_000)), stranger)
            assert [one.session_s for one in other.candidates] == [0] * len(REPLICAS)
    assert set(chosen.values()) == set(REPLICAS)


async def test_a_long_session_id_is_refused() -> None:
    router = Router("gateway")
    router.update("one", state(1, 100), time.monotonic())
    dispatcher = gateway_of(Replica(router, rejections=0))
    request = inference_pb2.GenerateRequest(prompt=prompt(0), session_id="x" * 129)
    with pytest.raises(BadRequestError, match="session_id must have at most 128 characters, got 129"):
        await anext(dispatcher.generate(request, None, Caller()))
