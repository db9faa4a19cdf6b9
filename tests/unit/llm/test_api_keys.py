"""Where the key of a model comes from: the environment, a file that is replaced, a registered function."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import register_api_keys
from openagents_worker.errors import LLMAuthError, LLMConnectionError, LLMRateLimitError, OpenAgentsError
from openagents_worker.llm import api_keys
from openagents_worker.llm.api_keys import FILE_CHECK_S, MAX_KEY_BYTES, KeyFile
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.secret_forms import MASK, mask_secrets
from openagents_worker.testing.model_server import ModelServer
from tests.unit.llm.raw_server import JSON, Sent, answering
from tests.unit.llm.wire import ANTHROPIC, CHAT, FORMATS, HI, Format, client_of

BASIC = "plain-key-0000000000-"
URL = "http://127.0.0.1:1/v1"
NOBODY = 65534  # the user without privileges


@pytest.fixture(autouse=True)
def _unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_resolver", None)


@pytest.fixture
def keys_seen() -> list[str]:
    return []


@pytest.fixture
def server(keys_seen: list[str]) -> Generator[ModelServer]:
    """A model that records the key of each request."""

    def reply(request: Any) -> dict[str, Any]:
        headers = request.headers
        keys_seen.append(headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer "))
        return {"text": "hello"}

    with ModelServer(reply).serve_in_thread() as server:
        yield server


async def ask(url: str, wire: Format = CHAT, *, tenant: str | None = None, **options: Any) -> str:
    model = client_of(wire, url, **options)
    token = current_call.set(CallInfo("r", "c", "k", 0, tenant=tenant))
    try:
        return (await model.generate(messages=HI)).output_text
    finally:
        current_call.reset(token)
        await model.aclose()


# --- a registered function -------------------------------------------------------------------------------


def _sync(provider: str, tenant: str | None) -> str:
    return f"{BASIC}{provider}-{tenant}-{threading.current_thread() is threading.main_thread()}"


async def _async(provider: str, tenant: str | None) -> str:
    return f"{BASIC}{provider}-{tenant}-{threading.current_thread() is not threading.main_thread()}"


class _Object:
    async def __call__(self, provider: str, tenant: str | None) -> str:
        return await _async(provider, tenant)


def _late(provider: str, tenant: str | None) -> Awaitable[str]:
    return _async(provider, tenant)


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
@pytest.mark.parametrize("resolver", [_sync, _async, _Object(), _late])
async def test_a_function_gives_the_key_of_a_tenant(
    server: ModelServer, keys_seen: list[str], wire: Format, resolver: Callable[..., Any]
) -> None:
    """Sync or async; a sync one is called in a thread, so it may block."""
    register_api_keys(resolver)
    await ask(server.url, wire, tenant="acme")
    await ask(server.url, wire)

    assert keys_seen == [f"{BASIC}{wire.provider}-{tenant}-False" for tenant in ("acme", None)]


async def test_a_key_is_asked_for_once_in_a_call_and_again_in_the_next(server: ModelServer) -> None:
    """Nothing is kept after a call, so a key that was revoked is not used. Retries of the call share it."""
    asked = 0

    async def resolver(provider: str, tenant: str | None) -> str:
        nonlocal asked
        asked += 1
        return f"{BASIC}{asked}"

    register_api_keys(resolver)
    script = [{"error": "connection"}, {"text": "one"}]
    async with ModelServer(script) as unsteady:
        await ask(unsteady.url)
    assert asked == 1
    await ask(server.url)
    assert asked == 2


async def test_a_function_may_say_that_no_key_is_needed(server: ModelServer, keys_seen: list[str]) -> None:
    register_api_keys(lambda provider, tenant: "")
    await ask(server.url)
    assert keys_seen == [""]


@pytest.mark.parametrize("options", [{"api_key_env": "OPENAI_API_KEY"}, {"api_key_file": "key"}])
async def test_an_agent_that_names_its_key_does_not_ask_the_function(
    server: ModelServer,
    keys_seen: list[str],
    options: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("sk-very-secret-key\n")
    register_api_keys(_sync)
    await ask(server.url, **options)
    assert keys_seen == ["sk-very-secret-key"]


def _raises(provider: str, tenant: str | None) -> str:
    raise OSError("cannot reach https://vault/?token=t0k3n-7-value")


def _stops(provider: str, tenant: str | None) -> str:
    raise StopIteration


def _limits(provider: str, tenant: str | None) -> str:
    raise LLMRateLimitError("the store is busy", retry_after_ms=5_000)


@pytest.mark.parametrize(
    ("resolver", "error", "says"),
    [
        (lambda provider, tenant: None, LLMAuthError, "returned no text for the provider 'openai_compatible' "
         "and the tenant 'acme', but NoneType"),
        (lambda provider, tenant: b"key", LLMAuthError, "but bytes"),
        (lambda provider, tenant: "plain-key-0000000000\n", LLMAuthError, "not a valid header"),
        (lambda provider, tenant: "k" * (MAX_KEY_BYTES + 1), LLMAuthError, "not a valid header"),
        (lambda provider: "", LLMConnectionError, "TypeError"),
        (_raises, LLMConnectionError, "OSError: cannot reach"),
        (_stops, LLMConnectionError, "StopIteration"),
        (_limits, LLMRateLimitError, "the store is busy"),
    ],
)  # fmt: skip
async def test_a_function_that_gives_no_key_is_an_error_with_a_code(
    resolver: Callable[..., Any], error: type[OpenAgentsError], says: str
) -> None:
    """A call never falls back to another key, which would bill somebody else. No error shows a secret."""
    register_api_keys(resolver)
    with pytest.raises(error, match=says) as caught:
        await ask(URL, tenant="acme", retry={"max_attempts": 1})

    assert "t0k3n-7-value" not in f"{caught.value}"
    assert "plain-key-0000000000" not in f"{caught.value}"


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_function_that_does_not_answer_has_a_time_limit(
    is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret store that hangs does not hold the run: the call is retried like after a lost connection."""
    over = threading.Event()

    async def hangs(provider: str, tenant: str | None) -> str:
        return await asyncio.get_running_loop().create_future()

    def blocks(provider: str, tenant: str | None) -> str:
        over.wait()
        return ""

    monkeypatch.setattr(api_keys, "RESOLVER_TIMEOUT_S", 0.05)
    register_api_keys(hangs if is_async else blocks)
    try:
        with pytest.raises(LLMConnectionError, match="gave no key"):
            await ask(URL, retry={"max_attempts": 1})
    finally:
        over.set()


async def test_many_calls_share_a_few_threads(server: ModelServer, keys_seen: list[str]) -> None:
    """A function that blocks is called in at most sixteen threads at once."""
    now, most, lock = 0, 0, threading.Lock()
    enough = threading.Event()

    def resolver(provider: str, tenant: str | None) -> str:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == api_keys.MAX_THREADS:
                enough.set()
        enough.wait()
        with lock:
            now -= 1
        return BASIC

    register_api_keys(resolver)
    model = client_of(CHAT, server.url)
    await asyncio.gather(*(model.generate(messages=HI) for _ in range(3 * api_keys.MAX_THREADS)))
    await model.aclose()
    assert most == api_keys.MAX_THREADS
    assert len(keys_seen) == 3 * api_keys.MAX_THREADS


def test_what_is_no_function_is_not_registered() -> None:
    with pytest.raises(TypeError, match="takes a function, not str"):
        register_api_keys("sk-key")  # type: ignore[arg-type]


# --- a key that was replaced -----------------------------------------------------------------------------


async def test_a_file_that_was_replaced_is_read_again(
    server: ModelServer, keys_seen: list[str], tmp_path: Path
) -> None:
    """A secret that Kubernetes mounts is replaced while the worker runs."""
    file = tmp_path / "key"
    file.write_text("plain-key-0000000001\n")
    now = 0.0
    keys = KeyFile(str(file), clock=lambda: now)
    assert await keys.key("p", None) == "plain-key-0000000001"

    (tmp_path / "new").write_text("plain-key-0000000002")
    (tmp_path / "new").replace(file)
    now += FILE_CHECK_S
    assert await keys.key("p", None) == "plain-key-0000000002"
    assert mask_secrets("with plain-key-0000000002") == f"with {MASK}"


@pytest.mark.parametrize("content", [None, "", "\x00\n\x01", "k" * (MAX_KEY_BYTES + 1)])
async def test_the_last_key_stays_in_use_while_the_file_is_not_readable(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A secret that is being written may be empty for a moment. The log says so, without the content."""
    file = tmp_path / "key"
    file.write_text("plain-key-0000000003")
    keys = KeyFile(str(file))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert await keys.key("p", None, fresh=True) == "plain-key-0000000003"
    file.write_text("plain-key-0000000004")
    assert await keys.key("p", None, fresh=True) == "plain-key-0000000004"


@pytest.mark.parametrize("wire", [CHAT, ANTHROPIC], ids=lambda wire: wire.provider)
async def test_a_key_that_the_provider_refuses_is_read_again(wire: Format, tmp_path: Path) -> None:
    """The old key is refused before the worker has seen the new one: the call sends the new one at once."""
    file = tmp_path / "key"
    file.write_text("plain-key-0000000005")
    seen: list[str] = []

    def reply(request: Any) -> dict[str, Any]:
        seen.append(request.headers.get("x-api-key") or request.headers["authorization"][7:])
        file.write_text("plain-key-0000000006")
        if seen[-1].endswith("6"):
            return {"text": "hello"}
        return {"error": "response", "status": 401, "message": f"the key {seen[-1]} is invalid"}

    async with ModelServer(reply) as server:
        assert await ask(server.url, wire, api_key_file=str(file)) == "hello"
    assert seen == ["plain-key-0000000005", "plain-key-0000000006"]


async def test_a_key_that_did_not_change_is_not_sent_twice() -> None:
    """The provider's answer is final then. It is shown without the key that it repeats."""
    register_api_keys(lambda provider, tenant: "short1")
    paths: list[str] = []
    body = b'{"error": {"message": "the key short1 is invalid"}}'

    async with answering(lambda _: Sent((body,), JSON, "401 Unauthorized"), paths) as url:
        with pytest.raises(LLMAuthError, match=r"the key \*\*\* is invalid") as caught:
            await ask(url)

    assert len(paths) == 1
    assert "the function that register_api_keys registered" in str(caught.value.hint)


# --- what is wrong at start ------------------------------------------------------------------------------


@contextmanager
def without_privileges() -> Iterator[None]:
    """The process is not root inside the block, because root may read every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_permission_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("k")
    file.chmod(0)
    with without_privileges(), pytest.raises(ValueError, match="Permission denied"):
        KeyFile(str(file))


def test_a_key_is_in_no_representation(tmp_path: Path) -> None:
    """Of the parts of a client: a debugger or a log line may show them."""
    key = "sk-very-secret-key"
    (tmp_path / "key").write_text(key)
    for options in ({}, {"api_key_file": str(tmp_path / "key")}):
        model: Any = client_of(CHAT, URL, **options)
        shown = f"{model!r} {model.__dict__!r} {model._endpoint!r} {model._endpoint.keys!r}"
        assert key not in shown
