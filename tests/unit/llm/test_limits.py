"""Limits in the agents file, their names, and what a request reserves and settles."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions, read_agents_file
from openagents_worker.errors import LLMRateLimitError
from openagents_worker.llm.base import CallInfo, LLMResponse, LLMUsage, ModelRequest, current_call
from openagents_worker.llm.limits import Limiter, RequestLimit, limit_name
from openagents_worker.llm.providers import make_client
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.testing.model_server import ModelServer
from tests.unit.llm.test_background import Notes, ask_in_background


def _agent(agent_id: str, **llm: Any) -> dict[str, Any]:
    return {
        "id": agent_id,
        "name": agent_id,
        "llm": {"provider": "mock", **llm},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
    }


def problems(*agents: dict[str, Any]) -> list[tuple[str, str]]:
    file = read_agents_file(json.dumps({"agents": list(agents)}), env={})
    found = [problem.to_dict() for problem in find_problems(file, {})]
    return [(each["path"], each["message"]) for each in found]


@pytest.mark.parametrize(
    ("limits", "path"),
    [
        ({"requests_per_minute": 0}, "agents[0].llm.limits.requests_per_minute"),
        ({"tokens_per_minute": -1}, "agents[0].llm.limits.tokens_per_minute"),
        ({"max_concurrency": 1.5}, "agents[0].llm.limits.max_concurrency"),
        ({"key": "tenant=acme"}, "agents[0].llm.limits.key"),
        ({"key": "{user}"}, "agents[0].llm.limits.key"),
        ({"key": "a b"}, "agents[0].llm.limits.key"),
        ({"requests_a_minute": 1}, "agents[0].llm.limits.requests_a_minute"),
    ],
)
def test_an_invalid_limit_is_a_problem_of_the_file(limits: dict[str, Any], path: str) -> None:
    assert [where for where, _ in problems(_agent("a", limits=limits))] == [path]


def test_agents_with_the_same_key_need_the_same_numbers() -> None:
    """Else each call would change the limit of the others."""
    shared = {"key": "shared", "requests_per_minute": 60}
    [(path, message)] = problems(
        _agent("a", limits=shared), _agent("b", limits=shared), _agent("c", limits={"key": "shared"})
    )

    assert path == "agents[2].llm.limits"
    assert message == "the limit 'shared' has other numbers in agents[0].llm.limits"


def test_the_name_of_a_tenant_cannot_imitate_another_limit() -> None:
    names = {
        limit_name(key, provider="p", model=model, tenant=tenant)
        for key, model, tenant in (
            ("{provider}:{model}", "m", ""),
            ("{tenant}", "m", "p:m"),
            ("{tenant}", "m", "{model}"),
            ("{tenant}", "m", "tenant=p:m"),
            ("{model}", "{tenant}", "x"),
        )
    }

    assert len(names) == 5


@dataclass
class Recorded:
    """The limits of an attempt, which record what is reserved and how it ends."""

    tenant: str = "acme"
    reserved: list[tuple[RequestLimit, int]] = field(default_factory=list)
    ended: list[dict[str, Any]] = field(default_factory=list)

    async def reserve(self, limit: RequestLimit, tokens: int) -> Recorded:
        self.reserved.append((limit, tokens))
        return self

    def end(self, **how: Any) -> None:
        self.ended.append(how)


@pytest.fixture
def limits() -> Any:
    recorded = Recorded()
    call = CallInfo("r", "c", "k", 0, kind="model", limits=recorded)
    token = current_call.set(call)
    yield recorded
    current_call.reset(token)


def _limiter(**numbers: Any) -> Limiter:
    options = LLMOptions(provider="mock", model="m", limits=numbers)
    assert options.limits is not None
    return Limiter(options, options.limits)


async def test_the_tokens_of_the_request_and_of_the_longest_reply_are_reserved(limits: Recorded) -> None:
    limiter = _limiter(tokens_per_minute=1_000)
    request = ModelRequest([{"role": "user", "content": "x" * 400}], max_tokens=50)

    async def send() -> LLMResponse:
        return LLMResponse(usage=LLMUsage(7, 3))

    await limiter.send(send, model="m", tokens=limiter.tokens_of(request))

    assert limits.reserved == [(RequestLimit("mock:m", tokens_per_minute=1_000), 150)]
    assert limits.ended == [{"used": 10, "retry_after_ms": 0}]


async def test_a_refused_request_gives_its_tokens_back_and_says_how_long_to_wait(limits: Recorded) -> None:
    async def send() -> LLMResponse:
        raise LLMRateLimitError("slow", retry_after_ms=5_000)

    with pytest.raises(LLMRateLimitError):
        await _limiter().send(send, model="m", tokens=100)

    assert limits.ended == [{"used": 0, "retry_after_ms": 5_000}]


async def test_a_request_without_an_answer_keeps_its_tokens(limits: Recorded) -> None:
    """The provider may have counted them."""

    async def send() -> LLMResponse:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await _limiter().send(send, model="m", tokens=100)

    assert limits.ended == [{"used": None, "retry_after_ms": 0}]


async def test_a_fallback_has_the_limit_of_its_own_model(limits: Recorded) -> None:
    options = LLMOptions(
        provider="scripted",
        model="first",
        script=[{"error": "connection", "times": 9}, {"text": "hello"}],
        limits={"requests_per_minute": 60},
        fallbacks=[{"model": "second", "script": [{"text": "hello"}]}],
    )

    await make_client(options, env={}).generate(messages=[{"role": "user", "content": "hi"}])

    assert [limit.name for limit, _ in limits.reserved] == ["scripted:first", "scripted:second"]


async def test_a_fallback_reserves_the_tokens_of_its_own_replies(limits: Recorded) -> None:
    """The request has the agent's `max_tokens`, as those of the patterns have."""
    options = LLMOptions(
        provider="scripted",
        model="first",
        max_tokens=32_000,
        script=[{"error": "connection", "times": 9}],
        limits={"tokens_per_minute": 100_000},
        fallbacks=[{"model": "second", "max_tokens": 4_096, "script": [{"text": "hello"}]}],
    )
    hi = [{"role": "user", "content": "hi"}]

    await make_client(options, env={}).generate(messages=hi, max_tokens=options.max_tokens)

    first, second = (tokens for _, tokens in limits.reserved)
    assert first - second == 32_000 - 4_096


class LimitedNotes(Notes):
    def __init__(self, limits: Recorded) -> None:
        super().__init__()
        self.limits = limits

    def info(self) -> CallInfo:
        return replace(super().info(), limits=self.limits)


async def test_a_response_that_goes_on_in_the_background_is_reserved_once() -> None:
    """The next attempt only gets its reply."""
    recorded = Recorded()
    notes = LimitedNotes(recorded)
    async with ModelServer([{"text": "hello"}]) as server:
        replies = [await ask_in_background(server, notes, None, limits={}) for _ in range(2)]

    assert [reply.output_text for reply in replies] == ["hello", "hello"]
    assert len(recorded.reserved) == len(recorded.ended) == 1
