"""Engine servers accept only callers with their token, and encrypt traffic where they listen beyond loopback."""

from __future__ import annotations

import grpc
import pytest

from kvarn.v1 import engine_pb2, engine_pb2_grpc
from serve_app.rpc.grpc_server import GrpcServer
from serve_app.security.engine_access import Address, EngineGuard


class Service(engine_pb2_grpc.EngineServicer):
    async def WatchCache(self, request: object, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.write(engine_pb2.EngineWatchCacheResponse())


async def call(address: Address) -> grpc.StatusCode:
    async with address.channel([]) as channel:
        stub = engine_pb2_grpc.EngineStub(address.authorized(channel))
        call = stub.WatchCache(engine_pb2.EngineWatchCacheRequest(), timeout=10, metadata=(("x-more", "1"),))
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


@pytest.mark.parametrize("encrypted", [False, True])
async def test_only_the_published_address_opens_the_server(encrypted: bool) -> None:
    guard = EngineGuard(encrypted)
    server = GrpcServer(
        "127.0.0.1:0", ["kvarn.v1.Engine"], check=guard.check, credentials=guard.credentials()
    )
    engine_pb2_grpc.add_EngineServicer_to_server(Service(), server)
    address = guard.published(f"127.0.0.1:{await server.start()}")
    try:
        assert Address(**address.metadata()) == address
        assert await call(address) is grpc.StatusCode.OK
        stranger = Address(address.address, EngineGuard(False).published("").token, address.certificate)
        assert await call(stranger) is grpc.StatusCode.UNAUTHENTICATED
        impostor = "" if encrypted else EngineGuard(True).published("").certificate
        for certificate in {impostor, EngineGuard(True).published("").certificate}:
            other = Address(address.address, address.token, certificate)
            assert await call(other) is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(0)


def test_secrets_do_not_show() -> None:
    address = EngineGuard(True).published("127.0.0.1:1")
    assert address.token not in repr(address)
    assert "BEGIN" not in repr(address)
