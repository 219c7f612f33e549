"""API keys: created, authenticated, revoked, rate-limited, reloaded; and the caller with and without them."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path

import pytest
import yaml

from serve_app.request.request_errors import (
    AuthenticationError,
    BadRequestError,
    CapacityError,
    RateLimitError,
)
from serve_app.routing import Caller
from serve_app.security.access import Access
from serve_app.security.api_keys import ApiKey, KeyFileError, create_key, read_keys, revoke_key
from serve_app.security.rate_limits import RateLimits
from tests.support.loop_watch import watching_loop


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **headers}


def caller(access: Access, headers: dict[str, str]) -> Caller:
    with access.admitted(headers) as who:
        return who


def test_a_key_is_its_tenant_and_the_file_does_not_hold_it(path: Path) -> None:
    key, entry = create_key(path, "acme", priority=3)
    assert key.partition("-")[2].startswith(entry.id)
    assert key.rpartition("-")[2] not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    access = Access(path)
    assert caller(access, bearer(key)) == Caller("acme", 3)
    basic = base64.b64encode(f"any:{key}".encode()).decode()
    assert caller(access, {"authorization": f"Basic {basic}"}) == Caller("acme", 3)


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer nonsense",
        "Basic !!",
        "Basic bm9jb2xvbg==",
        "Digest x",
        "Bearer kvarn-é-x",
    ],
)
async def test_anything_but_a_key_is_rejected(path: Path, authorization: str) -> None:
    create_key(path, "acme")
    with pytest.raises(AuthenticationError):
        await Access(path).check({"authorization": authorization})


async def test_a_key_with_a_wrong_secret_is_rejected(path: Path) -> None:
    key, _ = create_key(path, "acme")
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    with pytest.raises(AuthenticationError, match="The API key is unknown"):
        await Access(path).check(bearer(wrong))


async def test_every_rejection_is_reported_once_by_its_reason(path: Path) -> None:
    key, _ = create_key(path, "acme", requests_per_minute=1, burst=2, max_concurrent=1)
    reasons: list[str] = []
    access = Access(path, reasons.append)
    for headers in ({}, bearer("guess")):
        with pytest.raises(AuthenticationError):
            await access.check(headers)
    with access.admitted(bearer(key)), pytest.raises(RateLimitError), access.admitted(bearer(key)):
        pass
    with access.admitted(bearer(key)):
        pass
    with pytest.raises(RateLimitError), access.admitted(bearer(key)):
        pass
    with pytest.raises(BadRequestError), access.admitted(bearer(key, **{"x-kvarn-priority": "x"})):
        pass
    assert reasons == [
        "unauthenticated",
        "unauthenticated",
        "concurrency_limit",
        "rate_limit",
        "invalid_request",
    ]


def test_errors_after_admission_are_not_reported(path: Path) -> None:
    key, _ = create_key(path, "acme")
    reasons: list[str] = []
    with pytest.raises(CapacityError), Access(path, reasons.append).admitted(bearer(key)):
        raise CapacityError("No room.")
    assert reasons == []


def test_a_caller_cannot_take_another_tenant_nor_go_ahead_of_its_key(path: Path) -> None:
    key, _ = create_key(path, "acme", priority=3)
    access = Access(path)
    assert caller(access, bearer(key, **{"x-kvarn-tenant": "other"})).tenant == "acme"
    assert caller(access, bearer(key, **{"x-kvarn-priority": "-9"})).priority == 3
    assert caller(access, bearer(key, **{"x-kvarn-priority": "9"})).priority == 9


async def test_keys_that_come_and_go_need_no_restart(path: Path) -> None:
    first, entry = create_key(path, "acme")
    access = Access(path)
    second, _ = create_key(path, "zenith")
    await access.check(bearer(second))
    assert caller(access, bearer(second)).tenant == "zenith"
    revoke_key(path, entry.id)
    with pytest.raises(AuthenticationError):
        await access.check(bearer(first))


async def test_a_broken_file_keeps_the_last_keys(path: Path) -> None:
    key, _ = create_key(path, "acme")
    access = Access(path)
    path.write_text("keys: [")  # noqa: ASYNC240
    await access.check(bearer(key))
    path.unlink()  # noqa: ASYNC240
    await access.check(bearer(key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [", "is not valid YAML"),
        ("keys: 3", "keys: "),
        ("kyes: []", "kyes: Extra inputs are not permitted"),
        ("keys: [{id: x, sha256: y, tenant: z}]", "keys.0.id"),
    ],
)
def test_a_broken_file_is_an_error_at_start(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(KeyFileError, match=words):
        Access(path)


async def test_ten_thousand_keys_cost_the_loop_nothing(path: Path) -> None:
    key, entry = create_key(path, "acme")
    access = Access(path)
    others = [entry.model_copy(update={"id": f"{number:012x}"}) for number in range(10_000)]
    text = yaml.safe_dump({"keys": [one.model_dump(mode="json") for one in (entry, *others)]})
    with watching_loop() as watch:
        await asyncio.to_thread(path.write_text, text)
        await asyncio.gather(*(access.check(bearer(key)) for _ in range(3)))
        watch.check()
        start_s = time.thread_time()
        for _ in range(1000):
            await access.check(bearer(key))
        assert time.thread_time() - start_s < 0.4  # seconds of CPU; a search of all keys takes twice that


def test_revoking_an_unknown_key_is_an_error(path: Path) -> None:
    create_key(path, "acme")
    with pytest.raises(KeyFileError, match="holds no key with id 'beef'"):
        revoke_key(path, "beef")
    assert len(read_keys(path).keys) == 1


def limited(**limits: object) -> ApiKey:
    return ApiKey.model_validate({"id": "0" * 12, "sha256": "0" * 64, "tenant": "acme", **limits})


def test_a_key_may_send_a_burst_and_then_its_rate_per_minute() -> None:
    now = 0.0
    limits = RateLimits(lambda: now)
    key = limited(requests_per_minute=60, burst=2)
    for _ in range(2):
        with limits.admitted(key):
            pass
    with (
        pytest.raises(RateLimitError, match=r"60 requests per minute: try again in 1\.0 seconds") as refused,
        limits.admitted(key),
    ):
        pass
    assert refused.value.retry_after_s == pytest.approx(1)
    now = 1.0
    with limits.admitted(key):
        pass
    now = 1000.0
    for _ in range(2):
        with limits.admitted(key):
            pass
    with pytest.raises(RateLimitError), limits.admitted(key):
        pass


def test_a_key_has_a_concurrency_limit_and_a_failure_ends_a_request() -> None:
    limits, key = RateLimits(), limited(max_concurrent=1)
    with (
        limits.admitted(key),
        pytest.raises(RateLimitError, match="1 requests at once"),
        limits.admitted(key),
    ):
        pass
    with pytest.raises(ZeroDivisionError), limits.admitted(key):
        raise ZeroDivisionError
    with limits.admitted(key):
        pass


def test_limits_count_generations() -> None:
    now = 0.0
    limits = RateLimits(lambda: now)
    key = limited(max_concurrent=4, requests_per_minute=60, burst=6)
    with (
        limits.admitted(key, 3),
        pytest.raises(RateLimitError, match="4 requests at once"),
        limits.admitted(key, 2),
    ):
        pass
    with pytest.raises(RateLimitError, match=r"try again in 1\.0 seconds"), limits.admitted(key, 4):
        pass
    with limits.admitted(key, 3):
        pass


def test_a_request_over_the_whole_concurrency_limit_is_invalid() -> None:
    limits, key = RateLimits(), limited(max_concurrent=3)
    with (
        pytest.raises(BadRequestError, match=r"counts as 4.* may run 3 at once: lower n or send fewer"),
        limits.admitted(key, 4),
    ):
        pass
    with limits.admitted(key, 3):
        pass


def test_a_request_larger_than_a_burst_delays_later_ones() -> None:
    now = 0.0
    limits, key = RateLimits(lambda: now), limited(requests_per_minute=60, burst=3)
    with limits.admitted(key, 8):
        pass
    with pytest.raises(RateLimitError, match=r"try again in 6\.0 seconds"), limits.admitted(key):
        pass
    now = 6.0
    with limits.admitted(key):
        pass


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, Caller("", 0)),
        ({"x-kvarn-tenant": "acme", "x-kvarn-priority": "-3"}, Caller("acme", -3)),
        ({"user-agent": "grpc", "x-kvarn-priority": "7"}, Caller("", 7)),
    ],
)
def test_without_keys_headers_identify_the_caller(headers: dict[str, str], expected: Caller) -> None:
    assert caller(Access(), headers) == expected


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("x-kvarn-priority", "high", "x-kvarn-priority must be an integer of at most 9 digits, got 'high'."),
        ("x-kvarn-priority", "1" * 50, "x-kvarn-priority must be an integer of at most 9 digits"),
        ("x-kvarn-tenant", "x" * 129, "x-kvarn-tenant must have at most 128 characters, got 129."),
    ],
)
def test_invalid_headers_are_rejected(name: str, value: str, sentence: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        caller(Access(), {name: value})
    assert refused.value.sentence.startswith(sentence)
