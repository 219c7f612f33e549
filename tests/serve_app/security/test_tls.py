"""TLS and mutual TLS on both protocols, with certificates that are wrong, expired or replaced while servers run."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from serve_app.client import AsyncClient, UnavailableError
from serve_app.request.prompts import PromptEncoder
from serve_app.rpc.channels import Tls
from serve_app.security.tls import TlsError
from tests.support.gateway_servers import HOST, Running, running_servers

PAST = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


@dataclass
class Files:
    """Writes the PEM files of a server and of its clients."""

    directory: Path

    def write(self, server: trustme.LeafCert, client_ca: trustme.CA | None = None) -> dict[str, str]:
        paths = {"certificate": self.directory / "server.pem", "private_key": self.directory / "server.key"}
        paths["certificate"].write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
        paths["private_key"].write_bytes(server.private_key_pem.bytes())
        if client_ca is not None:
            paths["client_ca"] = self.directory / "clients.pem"
            paths["client_ca"].write_bytes(client_ca.cert_pem.bytes())
        return {name: str(path) for name, path in paths.items()}

    def client(self, server_ca: trustme.CA, own: trustme.LeafCert | None = None) -> Tls:
        """Write a client's files."""
        ca = self.directory / f"ca-{id(server_ca)}.pem"
        server_ca.cert_pem.write_to_path(ca)
        if own is None:
            return Tls(ca)
        certificate, key = self.directory / f"{id(own)}.pem", self.directory / f"{id(own)}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
        own.private_key_pem.write_to_path(key)
        return Tls(ca, certificate, key)


async def by_grpc(front: Running, tls: Tls) -> bool:
    async with AsyncClient(f"localhost:{front.grpc_port}", tls=tls) as client:
        try:
            return bool((await client.generate_once("Hi", timeout_s=10)).text)
        except UnavailableError:
            return False


async def by_http(front: Running, tls: Tls) -> bool:
    context = ssl.create_default_context(cafile=str(tls.ca))
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.private_key)
    async with httpx.AsyncClient(verify=context) as client:
        try:
            return (await client.get(f"https://localhost:{front.http_port}/livez")).status_code == 204
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return False


async def connects(front: Running, tls: Tls) -> tuple[bool, bool]:
    """Return whether a client can connect over gRPC, and over HTTP."""
    return await by_grpc(front, tls), await by_http(front, tls)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def front(encoder: PromptEncoder, files: Files, ca: trustme.CA) -> AsyncIterator[Running]:
    tls = files.write(ca.issue_cert("localhost"))
    async with running_servers(encoder, security={"tls": tls}) as running:
        yield running


@pytest.fixture
async def mutual(encoder: PromptEncoder, files: Files, ca: trustme.CA) -> AsyncIterator[Running]:
    tls = files.write(ca.issue_cert("localhost"), client_ca=ca)
    async with running_servers(encoder, security={"tls": tls}) as running:
        yield running


async def test_only_clients_of_the_right_ca_connect(front: Running, files: Files, ca: trustme.CA) -> None:
    assert await connects(front, files.client(ca)) == (True, True)
    assert await connects(front, files.client(trustme.CA())) == (False, False)


async def test_plain_text_is_rejected(front: Running) -> None:
    async with AsyncClient(front.address) as client:
        assert not await client.is_ready(timeout_s=5)
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://{HOST}:{front.http_port}/livez")


async def test_mutual_tls_requires_a_certificate_of_its_ca(
    mutual: Running, files: Files, ca: trustme.CA
) -> None:
    assert await connects(mutual, files.client(ca, ca.issue_cert("client"))) == (True, True)
    assert await connects(mutual, files.client(ca)) == (False, False)
    assert await connects(mutual, files.client(ca, trustme.CA().issue_cert("client"))) == (False, False)
    expired = ca.issue_cert("client", not_before=PAST, not_after=PAST + datetime.timedelta(days=1))
    assert await connects(mutual, files.client(ca, expired)) == (False, False)


async def test_clients_reject_an_expired_server(front: Running, files: Files, ca: trustme.CA) -> None:
    files.write(ca.issue_cert("localhost", not_before=PAST, not_after=PAST + datetime.timedelta(days=1)))
    assert await connects(front, files.client(ca)) == (False, False)
    files.write(ca.issue_cert("localhost"))
    assert await connects(front, files.client(ca)) == (True, True)


async def test_rotated_files_need_no_restart(mutual: Running, files: Files, ca: trustme.CA) -> None:
    old = files.client(ca, ca.issue_cert("client"))
    async with AsyncClient(f"localhost:{mutual.grpc_port}", tls=old) as open_client:
        assert (await open_client.generate_once("Hi")).text
        new_ca = trustme.CA()
        files.write(new_ca.issue_cert("localhost"), client_ca=new_ca)
        assert await connects(mutual, files.client(new_ca, new_ca.issue_cert("client"))) == (True, True)
        assert await connects(mutual, old) == (False, False)
        assert await connects(mutual, files.client(new_ca, ca.issue_cert("client"))) == (False, False)
        assert (await open_client.generate_once("Hi")).text  # open connections stay open


async def test_files_that_do_not_match_leave_the_last_ones_in_use(
    front: Running, files: Files, ca: trustme.CA
) -> None:
    (files.directory / "server.key").write_text("nonsense")
    assert await connects(front, files.client(ca)) == (True, True)
    (files.directory / "server.pem").unlink()
    assert await connects(front, files.client(ca)) == (True, True)


async def test_files_that_do_not_match_are_an_error_at_start(
    encoder: PromptEncoder, files: Files, ca: trustme.CA
) -> None:
    tls = files.write(ca.issue_cert("localhost"))
    ca.issue_cert("localhost").private_key_pem.write_to_path(tls["private_key"])
    with pytest.raises(TlsError, match=r"server\.pem.*cannot be used"):
        async with running_servers(encoder, security={"tls": tls}):
            pass
