"""The header `x-should-retry`: whether a failed request may succeed later, as the provider says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    LLMContextTooLong,
    LLMError,
    LLMRateLimitError,
    LLMReplyFiltered,
    LLMResponseError,
)
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.llm.failures import failure
from openagents_worker.llm.providers import make_client
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, sse, whole
from tests.unit.llm.wire import CHAT, FORMATS, HI, Format, Heard, ask, client_of

OK = Sent((json.dumps(whole(content="hello")).encode(),), JSON)


def refused(status: str, should_retry: str, *, text: str = "no", more: str = "") -> Sent:
    body = json.dumps({"error": {"message": text}}).encode()
    return Sent((body,), f"{JSON}\r\nx-should-retry: {should_retry}{more}", status)


class Server:
    """Answers one by one; the last answer is repeated."""

    def __init__(self, *answers: Sent) -> None:
        self._answers = list(answers)
        self.models: list[str] = []

    def __call__(self, body: dict[str, Any]) -> Sent:
        self.models.append(body["model"])
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.mark.parametrize("status", ["400 No", "404 No", "401 No", "500 No", "429 No"])
async def test_a_request_is_repeated_if_the_provider_says_so(status: str) -> None:
    """Whatever its status is: a proxy may answer 400 for a moment."""
    server = Server(refused(status, "true"), OK)

    async with answering(server) as url:
        reply = await ask(client_of(CHAT, url))

    assert reply.output_text == "hello"
    assert len(server.models) == 2


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
@pytest.mark.parametrize("may_suspend", [False, True])
@pytest.mark.parametrize(
    ("status", "kind"),
    [("500 No", LLMConnectionError), ("529 No", LLMConnectionError), ("429 No", LLMRateLimitError)],
)
async def test_a_request_is_not_repeated_if_the_provider_says_that_it_is_useless(
    wire: Format, may_suspend: bool, status: str, kind: type[LLMError]
) -> None:
    """Neither here nor by the next attempt of the run."""
    server = Server(refused(status, "false"))

    token = current_call.set(CallInfo("r", "c", "k", 0, may_suspend=may_suspend))
    try:
        async with answering(server) as url:
            with pytest.raises(kind) as caught:
                await ask(client_of(wire, url))
    finally:
        current_call.reset(token)

    assert (len(server.models), caught.value.is_final) == (1, True)


async def test_a_fallback_is_asked_although_a_retry_is_useless() -> None:
    """It is another model, with limits of its own."""
    server = Server(refused("429 No", "false"), OK)
    options = {"provider": CHAT.provider, "model": "m", "fallbacks": [{"model": "n"}]}

    async with answering(server) as url:
        reply = await ask(make_client(LLMOptions(**options, api_base=url), env={}))

    assert (reply.output_text, server.models) == ("hello", ["m", "n"])


async def test_a_key_that_was_replaced_is_read_again_for_a_repeated_request(tmp_path: Path) -> None:
    """A refused key with `true` is retried like a lost connection, but at once and with the new key."""
    file = tmp_path / "key"
    delays: list[tuple[str, int]] = []
    file.write_text("first-key-00000001")
    answers = [refused("401 No", "true"), OK]

    def reply(_: Any) -> Sent:
        file.write_text("second-key-0000002")
        return answers.pop(0)

    def emit(name: str, payload: Mapping[str, Any]) -> None:
        delays.append((name, payload["delay_ms"]))

    token = current_call.set(CallInfo("r", "c", "k", 0, emit=emit))
    try:
        async with answering(reply) as url:
            await ask(client_of(CHAT, url, api_key_file=str(file)))
    finally:
        current_call.reset(token)

    assert delays == [("llm.retrying", 0)]


@pytest.mark.parametrize(("should_retry", "code", "requests"), [("true", 400, 1), ("false", 500, 2)])
async def test_the_header_of_a_reply_says_nothing_of_an_error_in_it(
    should_retry: str, code: int, requests: int
) -> None:
    """It was sent before the error has happened."""
    head, error = f"{STREAM}\r\nx-should-retry: {should_retry}", {"error": {"message": "no", "code": code}}
    server = Server(Sent((sse(error),), head))

    async with answering(server) as url:
        with pytest.raises(LLMError):
            await ask(client_of(CHAT, url, retry={"max_attempts": 2}), HI, on_delta=Heard())

    assert len(server.models) == requests


@pytest.mark.parametrize(
    ("status", "text", "plain", "headers", "ms"),
    [
        (400, "no", LLMResponseError, {}, None),
        (400, "no", LLMResponseError, {"retry-after": "3"}, 3_000),
        (401, "no", LLMAuthError, {}, None),
        (400, "flagged by moderation", LLMReplyFiltered, {}, None),
        (413, "too large", LLMContextTooLong, {}, None),
        (429, "insufficient_quota", LLMResponseError, {}, None),
        (301, "moved", LLMResponseError, {}, None),
    ],
)
@pytest.mark.parametrize("said", [None, "true", "false", "maybe", " TRUE "])
def test_the_header_decides_whether_an_error_is_retried(
    status: int, text: str, plain: type[LLMError], headers: dict[str, str], ms: int | None, said: str | None
) -> None:
    """Without it, or with another word, the status and the text decide. A redirect stays one."""
    found = failure(
        {"error": {"message": text}},
        status=status,
        headers={**headers, **({} if said is None else {"x-should-retry": said})},
        provider="p",
        key_origin="k",
        secrets=(),
    )

    if said in ("true", " TRUE ") and status != 301:
        is_limit = status == 429 or ms is not None
        assert type(found) is (LLMRateLimitError if is_limit else LLMConnectionError)
        assert found.retry_after_ms == ms
    else:
        assert type(found) is plain
    assert found.is_final == (said == "false")
    assert found.status == status
