"""The provider `litellm`, with a module in place of the library; the real one is in tests/extras."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
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
    LLMReplyTooLarge,
    LLMResponseError,
    PluginConfigError,
)
from openagents_worker.llm import litellm_client
from openagents_worker.llm.base import FinishReason
from openagents_worker.llm.providers import make_client
from tests.support.waiting import await_for
from tests.unit.llm.raw_server import delta, whole
from tests.unit.llm.wire import HI, TOOLS, Heard

KEY = "plain-key-0000000000"
LIBRARY = """
asked = []
replies = []


async def acompletion(**arguments):
    asked.append(arguments)
    return await replies.pop(0)()
"""


class Body:
    """A reply or a chunk, as the library has them."""

    def __init__(self, fields: dict[str, Any], **hidden: Any) -> None:
        self._fields, self._hidden_params = fields, hidden

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return self._fields


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Sets what the library answers. An exception is raised; a list is a stream of chunks."""
    (tmp_path / "litellm.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.environ", dict(litellm_client._QUIET))
    litellm_client._library.cache_clear()

    def answers(*replies: Any) -> Any:
        module: Any = litellm_client._library()
        for reply in replies:

            async def give(reply: Any = reply) -> Any:
                if isinstance(reply, Exception):
                    raise reply
                return await reply() if callable(reply) else reply

            module.replies.append(give)
        return module

    yield answers
    litellm_client._library.cache_clear()
    sys.modules.pop("litellm", None)


class Chunks:
    """A stream of the library, with an error at its end or without."""

    def __init__(self, *chunks: Any, waits: bool = False) -> None:
        self.chunks, self.waits, self.closed = list(chunks), waits, threading.Event()
        self._hidden_params: dict[str, Any] = {}

    async def __aiter__(self) -> AsyncIterator[Any]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield Body(chunk)
        if self.waits:
            await asyncio.get_running_loop().create_future()

    async def aclose(self) -> None:
        self.closed.set()


def client(**options: Any) -> Any:
    given = {"provider": "litellm", "model": "cohere/command-r", "retry": {"max_attempts": 1}, **options}
    return make_client(LLMOptions(**given), env={"K": KEY})


async def ask(**call: Any) -> Any:
    model = client(**call.pop("options", {}))
    try:
        return await model.generate(messages=HI, **call)
    finally:
        await model.aclose()


async def test_a_call_of_the_library_is_a_request_as_any_other(library: Any) -> None:
    """With the agent's options and key, and without the library's own retries."""
    headers = {"llm_provider-x-request-id": "req-7"}
    body = whole(content="hello", usage={"prompt_tokens": 3, "completion_tokens": 2})
    module = library(Body(body, response_cost=0.25, additional_headers=headers))
    options = {"api_key_env": "K", "top_p": 0.5, "drop_params": True, "timeout_ms": 7_000}

    reply = await ask(options=options, tools=TOOLS)

    assert (reply.output_text, reply.finish_reason, reply.request_id) == ("hello", FinishReason.STOP, "req-7")
    assert reply.usage.metadata["cost_usd"] == 0.25
    (asked,) = module.asked
    expected = {
        "model": "cohere/command-r",
        "messages": HI,
        "tools": TOOLS,
        "top_p": 0.5,
        "drop_params": True,
    }
    assert expected.items() <= asked.items()
    assert (asked["api_key"], asked["timeout"]) == (KEY, 7.0)
    assert (asked["num_retries"], asked["max_retries"]) == (0, 0)


async def test_an_agent_without_a_key_leaves_it_to_the_library(library: Any) -> None:
    """It knows the variables of each provider."""
    module = library(Body(whole(content="hello")))
    await ask()
    assert "api_key" not in module.asked[0]


async def test_a_stream_is_delivered_in_pieces(library: Any) -> None:
    chunks = Chunks(delta(content="hel"), delta(content="lo"), delta("stop"))
    library(chunks)
    heard = Heard()

    assert (await ask(on_delta=heard)).output_text == "hello"
    assert heard.pieces == ["hel", "lo"]
    assert chunks.closed.is_set()


async def test_a_stream_that_breaks_off_is_no_answer(library: Any) -> None:
    library(Chunks(delta(content="hel")))
    with pytest.raises(LLMConnectionError, match="before its finish_reason"):
        await ask(on_delta=Heard())


async def test_a_cancelled_call_is_cancelled_in_the_library(library: Any) -> None:
    chunks = Chunks(delta(content="hel"), waits=True)
    library(chunks)
    heard = Heard()
    call = asyncio.create_task(ask(on_delta=heard))
    await await_for(lambda: heard.pieces, "the first piece")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert chunks.closed.is_set()


async def test_a_reply_has_a_limit(library: Any) -> None:
    library(Body(whole(content="x" * 5_000)), Chunks(*[delta(content="x" * 500)] * 10, delta("stop")))
    for heard in (None, Heard()):
        with pytest.raises(LLMReplyTooLarge):
            await ask(options={"max_reply_bytes": 1_024}, on_delta=heard)


def raised(kind: str, status: Any = None, message: str = "no", **headers: str) -> Exception:
    """An exception as the library's: its class says what happened."""
    error = type(kind, (Exception,), {})(f"litellm.{kind}: {message}")
    error.message, error.status_code = f"litellm.{kind}: {message}", status
    error.litellm_response_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (raised("AuthenticationError", 401, f"the key {KEY}"), LLMAuthError),
        (raised("ContextWindowExceededError", 400), LLMContextTooLong),
        (raised("ContentPolicyViolationError", 400), LLMReplyFiltered),
        (raised("BudgetExceededError"), LLMResponseError),
        (raised("UnsupportedParamsError", 400), LLMResponseError),
        (raised("RateLimitError", 429, retry_after="7"), LLMRateLimitError),
        (raised("Timeout", 408), LLMConnectionError),
        (raised("InternalServerError", 500), LLMConnectionError),
        (raised("APIError", 529), LLMConnectionError),
        (raised("APIError", "many"), LLMResponseError),
        (KeyError("choices"), LLMResponseError),
        (ConnectionResetError("gone"), LLMConnectionError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.code,
)
@pytest.mark.parametrize("where", ["call", "stream"])
async def test_every_exception_of_the_library_has_a_code(
    library: Any, error: Exception, kind: type[LLMError], where: str
) -> None:
    """At the begin of a call, and in the middle of a stream. None shows the key."""
    library(error if where == "call" else Chunks(error))

    with pytest.raises(LLMError) as caught:
        await ask(options={"api_key_env": "K"}, on_delta=None if where == "call" else Heard())

    assert type(caught.value) is kind
    assert KEY not in f"{caught.value!r} {caught.value.hint}"
    if kind is LLMRateLimitError:
        assert caught.value.retry_after_ms == 7_000
    if type(error).__name__ == "UnsupportedParamsError":
        assert "drop_params" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": None}, "llm.model: LiteLLM needs the name of the model"),
        ({"proxy": "http://h:1"}, "llm.proxy: LiteLLM opens its own connections"),
        ({"api_base": "ftp://x"}, "llm.api_base: not an http(s) URL"),
        ({"api_key_env": "NO"}, "llm.api_key_env: the environment variable NO is not set"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
        ({"drop_params": "perhaps"}, "llm.drop_params"),
    ],
)
def test_mistakes_in_its_options_are_found_at_start(library: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(PluginConfigError) as caught:
        client(**options)
    assert says in str(caught.value)


CALLED = [
    *HI,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "name": "add", "arguments": {}}]},
    {"role": "tool", "tool_call_id": "c", "name": "add", "content": "3"},
    *HI,
]


@pytest.mark.parametrize(
    ("model", "options", "declared"),
    [
        ("bedrock/amazon.nova-pro-v1:0", {}, ["add"]),
        ("anthropic/claude-sonnet-4-5", {}, ["add"]),
        ("vertex_ai/claude-opus-4-6", {}, ["add"]),
        ("ours", {"custom_llm_provider": "bedrock"}, ["add"]),
        ("cohere/command-r", {}, []),
    ],
)
async def test_the_tools_of_earlier_calls_are_declared_where_litellm_demands_it(
    library: Any, model: str, options: dict[str, Any], declared: list[str]
) -> None:
    """`plan_execute` writes its plan without tools, in a session whose turns have calls. LiteLLM refuses that
    for Claude and Bedrock."""
    module = library(*[Body(whole(content="hi"))] * 2)
    form = {"type": "json_schema", "json_schema": {"name": "plan", "schema": {"type": "object"}}}
    asked = client(model=model, **options)
    await asked.generate(messages=CALLED, tools=None, response_format=form)
    await asked.generate(messages=HI, tools=None)
    await asked.aclose()

    first, second = module.asked
    assert [tool["function"]["name"] for tool in first.get("tools", ())] == declared
    assert first["response_format"] == form
    assert "tool_choice" not in first
    assert "tools" not in second
