"""The Inference and Cluster services of a gateway."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from kvarn.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve_app.gateway.admission_queue import AdmissionQueue
from serve_app.request.handler import RequestHandler
from serve_app.routing import Router
from serve_app.rpc import wire
from serve_app.rpc.feed import Feed
from serve_app.rpc.grpc_server import headers_of
from serve_app.rpc.response_writer import ResponseWriter, WritePacer
from serve_app.security.access import Access

SERVICE_NAMES = [
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name,
]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generation for clients. Methods raise a `RequestError`, which `GrpcServer` converts to a status."""

    def __init__(self, dispatcher: RequestHandler, access: Access, write_timeout_s: float) -> None:
        self._dispatcher = dispatcher
        self._access = access
        self._write_timeout_s = write_timeout_s
        self._pacer = WritePacer()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream the deltas as they arrive from the engine, merged under load."""
        with self._access.admitted(headers_of(context.invocation_metadata())) as caller:
            async with ResponseWriter(context, self._write_timeout_s, self._pacer) as writer:
                responses = self._dispatcher.generate(request, context.time_remaining(), caller, writer)
                async with aclosing(responses):
                    async for response in responses:
                        await writer.write(response)

    async def GenerateOnce(  # noqa: N802
        self, request: inference_pb2.GenerateOnceRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GenerateOnceResponse:
        """Merge the deltas into one response."""
        merged, text = None, []
        with self._access.admitted(headers_of(context.invocation_metadata())) as caller:
            responses = self._dispatcher.generate(request, context.time_remaining(), caller)
            async with aclosing(responses):
                async for response in responses:
                    text.append(response.text)
                    if merged is None:
                        merged = response
                    else:
                        merged.MergeFrom(response)  # appends token_ids and logprobs, replaces everything else
        assert merged is not None
        return _once(merged, "".join(text))


class FleetFeed:
    """The state of the replicas as this gateway sees it, for `Cluster` and the console.

    Args:
        model_name: name of the served model.
        router: holds the state of the replicas.
        queue: holds the requests that wait.
    """

    def __init__(self, model_name: str, router: Router, queue: AdmissionQueue) -> None:
        self._model_name = model_name
        self._router = router
        self._queue = queue
        self._epoch = time.time_ns()
        self._sequence = 0
        self._feed = Feed(self._snapshot)

    def report_change(self, replica_id: str) -> None:
        """Publish that a replica changed or was removed."""
        self._sequence += 1
        if self._feed.is_watched:
            self._feed.publish(self._change(replica_id))

    def state(self) -> cluster_pb2.GetCacheStateResponse:
        """Return all replicas and the queue."""
        return cluster_pb2.GetCacheStateResponse(
            model=self._model_name, replicas=self._replicas(), queue=self._queue_state()
        )

    def watch(self) -> AsyncGenerator[cluster_pb2.WatchCacheResponse, None]:
        """Yield a snapshot of all replicas, then every change."""
        return self._feed.watch()

    def close(self) -> None:
        """End every watch."""
        self._feed.close()

    def _replicas(self) -> list[cluster_pb2.ReplicaCache]:
        return [wire.replica_to_proto(replica) for replica in self._router.replicas(time.monotonic())]

    def _queue_state(self) -> cluster_pb2.QueueState:
        return cluster_pb2.QueueState(requests=len(self._queue), tokens=self._queue.tokens)

    def _snapshot(self) -> cluster_pb2.WatchCacheResponse:
        return cluster_pb2.WatchCacheResponse(
            epoch=self._epoch,
            sequence=self._sequence,
            snapshot=cluster_pb2.FleetSnapshot(replicas=self._replicas()),
            queue=self._queue_state(),
        )

    def _change(self, replica_id: str) -> cluster_pb2.WatchCacheResponse:
        change = cluster_pb2.WatchCacheResponse(
            epoch=self._epoch, sequence=self._sequence, queue=self._queue_state()
        )
        replica = self._router.replica(replica_id, time.monotonic())
        if replica is None:
            change.removed_replica_id = replica_id
        else:
            change.updated.CopyFrom(wire.replica_to_proto(replica))
        return change


class ClusterService(cluster_pb2_grpc.ClusterServicer):
    """State of the replicas, and explanations of routing decisions."""

    def __init__(self, feed: FleetFeed, dispatcher: RequestHandler, access: Access) -> None:
        self._feed = feed
        self._dispatcher = dispatcher
        self._access = access

    async def GetCacheState(  # noqa: N802
        self, request: cluster_pb2.GetCacheStateRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.GetCacheStateResponse:
        """Return all replicas and the queue."""
        return self._feed.state()

    async def WatchCache(  # noqa: N802
        self, request: cluster_pb2.WatchCacheRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream a snapshot of all replicas, then every change."""
        async with aclosing(self._feed.watch()) as events:
            async for event in events:
                await context.write(event)

    async def ExplainRoute(  # noqa: N802
        self, request: cluster_pb2.ExplainRouteRequest, context: grpc.aio.ServicerContext
    ) -> cluster_pb2.ExplainRouteResponse:
        """Explain a routing decision; it counts against the caller's limits as the request itself would."""
        with self._access.admitted(headers_of(context.invocation_metadata())) as caller:
            return await self._dispatcher.explain(request, caller)


def _once(merged: inference_pb2.GenerateResponse, text: str) -> inference_pb2.GenerateOnceResponse:
    return inference_pb2.GenerateOnceResponse(
        request_id=merged.request_id,
        replica_id=merged.replica_id,
        token_ids=merged.token_ids,
        text=text,
        logprobs=merged.logprobs,
        finish_reason=merged.finish_reason,
        stop_reason=merged.stop_reason if merged.HasField("stop_reason") else None,
        usage=merged.usage,
        resumptions=merged.resumptions,
        inexact_because=merged.inexact_because,
    )
