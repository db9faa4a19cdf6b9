"""The wire formats: what holds for each provider, whole and streamed."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import (
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    PluginConfigError,
)
from openagents_worker.http_replies import ReplyTooLarge
from openagents_worker.llm.base import LLMResponse
from openagents_worker.llm.base import ModelRequest as Request
from openagents_worker.llm.conversation import UniqueCallIds, assistant_message, usable_calls
from openagents_worker.llm.openai_responses import OpenAIResponses, ResponsesExtras
from openagents_worker.llm.providers import make_client
from openagents_worker.llm.structured import response_format
from openagents_worker.testing.model_server import FAULTS as ALL_FAULTS
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.unit.llm.raw_server import STREAM, raw_server, sse
from tests.unit.llm.test_conversation import MESSAGES, asks, call, result, user
from tests.unit.llm.wire import (
    ANTHROPIC,
    CHAT,
    FORMATS,
    HI,
    KEY,
    RESPONSES,
    TOOLS,
    Format,
    Heard,
    ask,
    client_of,
)

NEWER = (ANTHROPIC, RESPONSES)
STREAMED = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
EVERY = pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)


def _listener(streamed: bool) -> Heard | None:
    return Heard() if streamed else None


# --- conformance -----------------------------------------------------------------------------------------

TURN = {
    "text": "Let me add that. ünï 💡",
    "reasoning": "The user wants a sum.",
    "tool_calls": [
        {"name": "add", "arguments": {"x": 1, "note": "ünï 💡"}},
        {"name": "add", "arguments": {"x": 2}},
    ],
    "usage": {"input_tokens": 100, "output_tokens": 20, "cached_tokens": 40},
}


@EVERY
@STREAMED
async def test_a_turn_with_calls_is_read_and_continued(wire: Format, streamed: bool) -> None:
    """Text, calls, tokens and the reason of the end. The next request is accepted with all that was said."""
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return TURN if request.n == 0 else {"text": "3"}

    async with ModelServer(reply) as server:
        heard = _listener(streamed)
        first = await ask(client_of(wire, server.url), tools=TOOLS, on_delta=heard)
        calls = usable_calls(first.tool_calls, UniqueCallIds(), 1)
        results = [result(each.id, content="1", name=each.name) for each in calls]
        again = [*HI, assistant_message(first, calls), *results]
        second = await ask(client_of(wire, server.url), again, tools=TOOLS, on_delta=_listener(streamed))

    assert first.output_text == TURN["text"]
    assert [(each.name, each.arguments) for each in first.tool_calls] == [
        ("add", {"x": 1, "note": "ünï 💡"}),
        ("add", {"x": 2}),
    ]
    assert len({each.id for each in first.tool_calls}) == 2
    assert first.usage is not None
    counts = (first.usage.input_tokens, first.usage.output_tokens, first.usage.metadata["cached_tokens"])
    assert counts == (100, 20, 40)
    assert (first.provider, first.model) == (wire.provider, wire.model)
    assert heard is None or heard.text == TURN["text"]
    assert second.output_text == "3"
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "tool", "tool"]
    assert asked[1].messages[1]["content"] == TURN["text"]
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "stop")
    assert "The user wants a sum." in json.dumps(asked[1].body)


@EVERY
@STREAMED
async def test_why_a_reply_ended_is_said_in_the_same_words(wire: Format, streamed: bool) -> None:
    """A cut answer, a refusal."""
    script = {
        "long": {"text": "Once upon", "usage": {"output_tokens": 50}},
        "bad": {"refusal": "I will not."},
    }
    async with ModelServer(lambda request: script[request.messages[-1]["content"]]) as server:
        heard = [_listener(streamed) for _ in range(2)]
        cut = await ask(client_of(wire, server.url), [user("long")], max_tokens=50, on_delta=heard[0])
        refused = await ask(client_of(wire, server.url), [user("bad")], on_delta=heard[1])

    assert (cut.output_text, cut.finish_reason) == ("Once upon", "length")
    assert (refused.output_text, refused.finish_reason) == ("I will not.", "refusal")
    assert [block["type"] for block in refused.content] == ["refusal"]


FAULTS = {
    "bad_json": LLMResponseError,
    "connection": LLMConnectionError,
    "cut_stream": LLMConnectionError,
    "disconnect": LLMConnectionError,
    "error_in_200": LLMConnectionError,
    "garbage": LLMError,
    "half_character": None,
    "hang": LLMConnectionError,
    "overloaded": LLMConnectionError,
    "rate_limit": LLMRateLimitError,
    "reset": LLMConnectionError,
    "response": LLMResponseError,
    "server_error": LLMConnectionError,
    "slow_body": LLMConnectionError,
    "slow_headers": LLMConnectionError,
    "wrong_content_type": LLMError,
}


@EVERY
@STREAMED
async def test_a_fault_has_the_same_error_with_every_provider(wire: Format, streamed: bool) -> None:
    """Retryable or not, with the provider's message and without the key."""
    assert FAULTS.keys() == ALL_FAULTS.keys()
    found: dict[str, Any] = {}
    async with ModelServer(lambda request: {"error": request.messages[-1]["content"]}) as server:
        for fault in FAULTS:
            slow = 150 if fault.startswith("slow") or fault == "hang" else 20_000
            client = client_of(wire, server.url, timeout_ms=slow, retry={"max_attempts": 1})
            try:
                found[fault] = await ask(client, [user(fault)], on_delta=_listener(streamed))
            except LLMError as error:
                found[fault] = error

    assert KEY not in str(found)
    for fault, expected in FAULTS.items():
        if expected is not None:
            assert isinstance(found[fault], expected), (fault, found[fault])
    half = found["half_character"]
    assert isinstance(half, LLMError) or "\ufffd" in half.output_text


@EVERY
@STREAMED
@pytest.mark.parametrize("fault", ["rate_limit", "overloaded", "server_error"])
async def test_the_time_that_a_server_asks_for_reaches_the_run(
    wire: Format, streamed: bool, fault: str
) -> None:
    """The error can be retried, and not earlier. Its request has an id."""
    async with ModelServer([{"error": fault, "retry_after_ms": 1_500}]) as server:
        client = client_of(wire, server.url, retry={"max_attempts": 1})
        with pytest.raises(LLMRateLimitError) as caught:
            await ask(client, on_delta=_listener(streamed))

    assert caught.value.retryable
    assert caught.value.retry_after_ms == 1_500
    assert caught.value.request_id


PROVIDERS_WITHOUT_HTTP = [
    LLMOptions(provider="mock"),
    LLMOptions(provider="scripted", script=[{"text": "Echo: hi (history=0)"}]),
]


@pytest.mark.parametrize(
    "options",
    [*(LLMOptions(provider=wire.provider, model=wire.model) for wire in FORMATS), *PROVIDERS_WITHOUT_HTTP],
    ids=lambda options: options.provider,
)
@STREAMED
async def test_a_reply_is_the_same_with_every_provider(options: LLMOptions, streamed: bool) -> None:
    """Text, pieces, tokens, the reason of its end; and the journal gives it back as it was."""
    heard = _listener(streamed)
    async with ModelServer(lambda _: {"text": "Echo: hi (history=0)"}) as server:
        env = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
        client = make_client(options.model_copy(update={"api_base": server.url}), env=env)
        reply = await ask(client, on_delta=heard)

    assert (reply.output_text, reply.finish_reason) == ("Echo: hi (history=0)", "stop")
    assert (reply.provider, reply.tool_calls) == (options.provider, ())
    assert reply.model
    assert reply.usage is not None
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0
    assert heard is None or heard.text == reply.output_text
    assert LLMResponse.from_wire(json.loads(json.dumps(reply.to_wire()))).to_wire() == reply.to_wire()


@EVERY
async def test_a_call_is_recognised_by_its_headers(wire: Format) -> None:
    """The key of the provider, in the provider's header."""
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return {"text": "ok"}

    async with ModelServer(reply) as server:
        await ask(client_of(wire, server.url, extra_headers={"x-team": "blue"}))

    headers = asked[0].headers
    assert headers["x-team"] == "blue"
    key = headers["x-api-key"] if wire is ANTHROPIC else headers["authorization"].removeprefix("Bearer ")
    assert key == KEY


# --- whatever is sent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", NEWER, ids=lambda wire: wire.provider)
@given(messages=MESSAGES)
def test_whatever_the_messages_the_request_is_accepted(wire: Format, messages: list[dict[str, Any]]) -> None:
    """Checked with the rules of the provider: pairs, ids, places, empty texts."""
    wire.check(wire.body([*messages, user()]))
    wire.check(wire.body(messages) if messages else wire.body([user()]))


@pytest.mark.parametrize("wire", NEWER, ids=lambda wire: wire.provider)
@given(before=MESSAGES, after=MESSAGES)
def test_a_conversation_that_grows_keeps_its_beginning(
    wire: Format, before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """So the provider's prompt cache is used. Marks of the cache move; they are not part of the prompt."""
    begins = _turns(wire, [*before, user(), asks(call("q")), result("q")])
    grown = _turns(
        wire, [*before, user(), asks(call("q")), result("q"), {"role": "assistant", "content": "x"}, *after]
    )

    assert grown[: len(begins)] == begins


def _turns(wire: Format, messages: list[dict[str, Any]]) -> list[Any]:
    body = json.loads(
        json.dumps(wire.body(messages)).replace('"cache_control": {"type": "ephemeral"}', '"c": 0')
    )
    turns: list[Any] = body["messages"] if wire is ANTHROPIC else body["input"]
    for turn in turns:
        for block in turn["content"] if wire is ANTHROPIC else ():
            block.pop("c", None)
    return turns


BLOCKS = [
    {"type": "text", "text": "look"},
    {"type": "image", "url": "https://x.test/a.png", "detail": "low"},
    {"type": "image", "data": "aW1n", "media_type": "image/png"},
    {"type": "file", "url": "https://x.test/a.pdf", "name": "a.pdf"},
    {"type": "file", "data": "cGRm", "media_type": "application/pdf", "name": "b.pdf"},
    {"type": "file", "file_id": "file_7"},
]


@EVERY
def test_images_and_files_are_sent_as_they_are(wire: Format) -> None:
    """By URL, as base64 and by id; of a user and of a tool."""
    body = wire.body([user(BLOCKS), asks(call("a")), result("a", content=BLOCKS[:3]), user()], tools=TOOLS)
    wire.check(body)
    text = json.dumps(body)

    for value in ("https://x.test/a.png", "aW1n", "https://x.test/a.pdf", "cGRm", "b.pdf", "file_7", "look"):
        assert value in text, value
    assert text.count("https://x.test/a.png") == 2


@pytest.mark.parametrize("wire", NEWER, ids=lambda wire: wire.provider)
def test_reasoning_goes_back_to_its_own_provider_only(wire: Format) -> None:
    """Another provider could not read it: the model of an agent may change in a conversation."""
    blocks = [
        {"type": "reasoning", "text": "mine", "signature": "s", "encrypted": "", "id": "rs_1", "format": name}
        for name in ("anthropic_messages", "responses", "chat_completions")
    ]
    blocks[1] |= {"encrypted": "e"}
    message = {"role": "assistant", "content": [*blocks, {"type": "text", "text": "said"}]}
    text = json.dumps(wire.body([*HI, message, user()]))

    assert text.count("mine") == 1
    assert "said" in text


def test_anthropic_is_sent_system_messages_in_the_middle_as_the_users() -> None:
    """Most models accept them at the beginning only."""
    body = ANTHROPIC.body(
        [{"role": "system", "content": "Be kind."}, *HI, {"role": "system", "content": "Be brief."}]
    )
    ANTHROPIC.check(body)

    assert [block["text"] for block in body["system"]] == ["Be kind."]
    assert [block["text"] for block in body["messages"][0]["content"]] == [
        *("hi", "<system>", "Be brief.", "</system>")
    ]


def test_anthropics_prompt_cache_is_marked_at_four_places_at_most() -> None:
    """The tools, the instructions, and the last two turns of the user."""
    turns = [each for n in range(4) for each in (asks(call(f"c{n}")), result(f"c{n}"))]
    body = ANTHROPIC.body([{"role": "system", "content": "Be kind."}, *HI, *turns], tools=TOOLS)
    ANTHROPIC.check(body)
    marked = [at for at, turn in enumerate(body["messages"]) if "cache_control" in turn["content"][-1]]

    assert marked == [6, 8]
    assert "cache_control" in body["system"][-1]
    assert "cache_control" in body["tools"][-1]

    found_by_search = {"type": "custom", "name": "rare", "defer_loading": True, "input_schema": {}}
    deferred = ANTHROPIC.body(HI, tools=[*TOOLS, found_by_search])["tools"]
    assert ["cache_control" in tool for tool in deferred] == [True, False]  # the API rejects it there

    own = [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]
    assert json.dumps(ANTHROPIC.body([user(own)], tools=TOOLS)).count("cache_control") == 1


# --- whatever comes back ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    [
        *("type", "content", "output", "id", "name", "input", "arguments", "usage", "stop_reason", "delta"),
        *("index", "message", "response", "item", "text", "status", "error", "summary", "content_block"),
    ]
)
TYPES = st.sampled_from(
    [
        *("message", "text", "tool_use", "thinking", "function_call", "reasoning", "refusal", "output_text"),
        *("message_start", "content_block_start", "content_block_delta", "message_delta", "text_delta"),
        *("input_json_delta", "citations_delta", "response.created", "response.output_item.done", "error"),
        *("response.output_text.delta", "response.completed", "response.function_call_arguments.delta"),
    ]
)
HOSTILE = st.recursive(
    JSON | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("wire", NEWER, ids=lambda wire: wire.provider)
@given(body=HOSTILE)
def test_whatever_the_body_there_is_a_reply_or_a_coded_error(wire: Format, body: Any) -> None:
    """Never an untyped exception, and never a reply that cannot be stored."""
    with suppress(LLMError):
        json.dumps(wire.codec().reply(body, provider="p").to_wire(), allow_nan=False).encode()


@pytest.mark.parametrize("wire", NEWER, ids=lambda wire: wire.provider)
@given(events=st.lists(st.dictionaries(NAMES, HOSTILE, max_size=5), max_size=6))
def test_whatever_the_events_there_is_a_reply_or_a_coded_error(
    wire: Format, events: list[dict[str, Any]]
) -> None:
    """The same for a stream."""
    reader = wire.reader()
    with suppress(LLMError, ReplyTooLarge):
        for event in events:
            reader.add(event)
        wire.codec().reply(reader.body(), provider="p")


ENDLESS = {
    "anthropic": [
        [
            {"type": "content_block_start", "index": n, "content_block": {"type": "text", "text": ""}}
            for n in range(99)
        ],
        [
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *[{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ""}}] * 99,
        ],
        [
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": {"type": "thinking", "thinking": ""},
            },
            *[
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "signature_delta", "signature": "x" * 50},
                }
            ]
            * 99,
        ],
        [
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            *[
                {
                    "type": "content_block_delta",
                    "index": 0,
                    "delta": {"type": "citations_delta", "citation": {"a": 1}},
                }
            ]
            * 199,
        ],
    ],
    "openai_responses": [
        [{"type": "response.output_text.delta", "output_index": 0, "delta": ""}] * 99,
        [{"type": "response.function_call_arguments.delta", "output_index": 0, "delta": "x"}] * 99,
        [{"type": "response.reasoning_text.delta", "output_index": 0, "delta": "x"}] * 99,
        [{"type": "response.output_item.added", "output_index": 0, "item": {"type": "message"}}] * 99,
        [{"type": "response.output_item.done", "output_index": 0, "item": {"type": "message"}}] * 999,
    ],
}


@pytest.mark.parametrize(
    ("wire", "events"),
    [(wire, events) for wire in NEWER for events in ENDLESS[wire.provider]],
    ids=lambda value: getattr(value, "provider", ""),
)
def test_an_endless_stream_is_read_to_its_limit(wire: Format, events: list[dict[str, Any]]) -> None:
    """Also one of empty pieces, of signatures, of citations or of items: each has a size of its own."""
    reader = wire.codec().stream(max_chars=1_000)

    with pytest.raises(ReplyTooLarge):
        _ = [reader.add(event) for event in events]


ANTHROPIC_BLOCKS = st.lists(
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, st.sampled_from(["a", "ünï 💡", "\n\n"])),
        st.builds(lambda t: {"type": "thinking", "thinking": t, "signature": f"s{t}"}, st.sampled_from("xy")),
        st.just({"type": "redacted_thinking", "data": "ZGF0YQ"}),
        st.just({"type": "text", "text": "b", "citations": [{"type": "char_location", "cited_text": "c"}]}),
        st.just({"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "q"}}),
        st.builds(
            lambda x: {"type": "tool_use", "id": "?", "name": "add", "input": {"x": x}}, st.integers(0, 3)
        ),
    ),
    min_size=1,
    max_size=5,
)


@given(blocks=ANTHROPIC_BLOCKS)
def test_a_reply_of_anthropic_goes_back_as_it_came(blocks: list[dict[str, Any]]) -> None:
    """Every block but blank text, in its place and unchanged: the provider checks the signatures."""
    sent = [{**b, "id": f"toolu_{n}"} if b["type"] == "tool_use" else b for n, b in enumerate(blocks)]
    thought = {"type": "thinking", "thinking": "z", "signature": "sz"}
    sent = [thought, *sent, {"type": "text", "text": "end"}]
    reply = ANTHROPIC.codec().reply({"content": sent, "stop_reason": "tool_use"}, provider="p")
    back = ANTHROPIC.body([*HI, assistant_message(reply, reply.tool_calls), *_results(reply)])

    assert back["messages"][1]["content"] == [block for block in sent if block.get("text") != "\n\n"]


def _results(reply: Any) -> list[dict[str, Any]]:
    return [result(each.id) for each in reply.tool_calls] or [user()]


RESPONSE_ITEMS = st.lists(
    st.one_of(
        st.builds(
            lambda t: {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": each} for each in t],
                "encrypted_content": "e",
            },
            st.lists(st.sampled_from(["x", "y"]), max_size=2),
        ),
        st.builds(lambda t: {"role": "assistant", "content": t}, st.sampled_from(["a", "ünï 💡", "\n\n"])),
        st.builds(
            lambda t: {"role": "assistant", "content": t, "phase": "commentary"}, st.sampled_from(["a", "b"])
        ),
        st.just({"type": "web_search_call", "id": "ws_1", "status": "completed"}),
        st.builds(
            lambda x, own: {
                "type": "function_call",
                "call_id": "?",
                "name": "add",
                "arguments": f'{{"x":{x}}}',
                **own,
            },
            st.integers(0, 3),
            st.sampled_from([{}, {"namespace": "crm"}, {"async": True}]),
        ),
    ),
    min_size=1,
    max_size=5,
)


@given(items=RESPONSE_ITEMS)
def test_a_response_goes_back_as_it_came(items: list[dict[str, Any]]) -> None:
    """Every item but blank text, in its place: reasoning belongs to the item that follows it."""
    sent = [
        {**each, "call_id": f"call_{n}"} if each.get("type") == "function_call" else each
        for n, each in enumerate(items)
    ]
    thought = {"type": "reasoning", "id": "rs_0", "summary": [], "encrypted_content": "e"}
    sent = [thought, *sent, {"role": "assistant", "content": "end"}]
    reply = RESPONSES.codec().reply(
        {"status": "completed", "output": [_output(each) for each in sent]}, provider="p"
    )
    back = RESPONSES.body([*HI, assistant_message(reply, reply.tool_calls), *_results(reply)])

    kept = [item for item in sent if item.get("content") != "\n\n"]
    assert back["input"][1 : len(kept) + 1] == kept


def test_the_result_of_a_call_goes_back_to_the_program_that_made_it() -> None:
    """A program of the provider. A call that the model made itself has no caller."""
    program = {"type": "program", "caller_id": "prog_1"}
    calls = [
        {"type": "function_call", "call_id": name, "name": "add", "arguments": "{}", "caller": caller}
        for name, caller in (("a", program), ("b", {"type": "direct"}))
    ]
    reply = RESPONSES.codec().reply({"status": "completed", "output": calls}, provider="p")
    stored = LLMResponse.from_wire(json.loads(json.dumps(reply.to_wire())))
    back = RESPONSES.body([*HI, assistant_message(stored, stored.tool_calls), *_results(stored)])
    RESPONSES.check(back)

    callers = [(item["type"], item["call_id"], item.get("caller")) for item in back["input"][1:]]
    assert callers == [
        ("function_call", "a", program),
        ("function_call", "b", None),
        ("function_call_output", "a", program),
        ("function_call_output", "b", None),
    ]


@STREAMED
async def test_a_response_has_the_price_of_the_tier_that_served_it(streamed: bool) -> None:
    usage = {"input_tokens": 1_000_000, "output_tokens": 0, "total_tokens": 1_000_000}
    response = {"id": "r", "object": "response", "status": "completed", "output": [], "usage": usage}
    response |= {"service_tier": "flex", "output": [_output({"role": "assistant", "content": "hi"})]}
    event = sse({"type": "response.completed", "response": response})
    sent = (event, STREAM) if streamed else (json.dumps(response).encode(), "content-type: application/json")

    async with raw_server(sent[0], head=sent[1]) as url:
        reply = await ask(client_of(RESPONSES, url), on_delta=_listener(streamed))

    assert reply.usage is not None
    assert reply.usage.metadata["cost_usd"] == 0.625  # gpt-5: half of the standard tier's


def _output(item: dict[str, Any]) -> dict[str, Any]:
    """The item of a reply for an item of a request."""
    if item.get("role") != "assistant":
        return item
    part = {"type": "output_text", "text": item["content"], "annotations": []}
    return {**item, "type": "message", "id": "msg_1", "status": "completed", "content": [part]}


# --- structured output -----------------------------------------------------------------------------------

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer", "minimum": 1}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
ANSWER = {"city": "Oslo", "people": 700_000}


@pytest.mark.parametrize(
    ("wire", "model", "place"),
    [
        (CHAT, "gpt-4o", lambda body: body["response_format"]["json_schema"]["schema"]),
        (RESPONSES, "gpt-5", lambda body: body["text"]["format"]["schema"]),
        (ANTHROPIC, "claude-sonnet-4-5", lambda body: body["output_config"]["format"]["schema"]),
        (ANTHROPIC, "claude-3-5-haiku-latest", lambda body: body["tools"][-1]["input_schema"]),
    ],
)
def test_the_schema_of_the_output_is_on_the_wire(wire: Format, model: str, place: Any) -> None:
    """As each provider takes it; an older model of Anthropic gets a tool whose arguments are the output."""
    tools = None if wire is CHAT else TOOLS  # many servers cannot call tools while they follow a schema
    request = {"messages": HI, "tools": tools, "response_format": response_format("a city", CITY)}

    body = wire.codec().body(Request(**request), model)
    wire.check(body)

    assert place(body)["properties"].keys() == CITY["properties"].keys()
    assert place(body)["additionalProperties"] is False


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        ("claude-haiku-5-5", {"type": "any"}),
        ("claude-opus-4-5", {"type": "any"}),
        ("claude-opus-5-5", {"type": "auto"}),
        ("claude-sonnet-5-5", {"type": "auto"}),
        ("anthropic/claude-fable-5-1", {"type": "auto"}),
        ("claude-mythos-5-2", {"type": "auto"}),
    ],
)
def test_a_model_that_cannot_be_forced_to_call_the_output_tool_is_not_forced(
    model: str, choice: dict[str, Any]
) -> None:
    """Its API rejects that. A schema with keys that the model chooses is sent as a tool."""
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    request = Request(HI, tools=TOOLS, response_format=response_format("counts", counts))

    body = ANTHROPIC.codec().body(request, model)

    assert body["tools"][-1]["name"] == "final_answer_as_json"
    assert body["tool_choice"] == choice


@pytest.mark.parametrize("wire", [CHAT, ANTHROPIC], ids=lambda wire: wire.provider)
@STREAMED
async def test_the_arguments_of_the_output_tool_are_the_answer(wire: Format, streamed: bool) -> None:
    """The pattern sees an answer in JSON, and no tool call."""
    entry = {"tool_calls": [{"name": "final_answer_as_json", "arguments": ANSWER}]}
    heard = _listener(streamed) if wire is ANTHROPIC else None
    async with ModelServer([entry]) as server:
        client = client_of(wire, server.url, structured_output="tool")
        reply = await ask(client, response_format=response_format("city", CITY), on_delta=heard)

    assert json.loads(reply.output_text) == ANSWER
    assert (list(reply.tool_calls), reply.structured_output, reply.finish_reason) == ([], ANSWER, "stop")
    assert heard is None or json.loads(heard.text) == ANSWER


@EVERY
async def test_a_provider_that_rejects_the_schema_gets_requests_without_it(wire: Format) -> None:
    """It is asked once with the schema. If the option says that it has it, the error is raised."""
    asked: list[bool] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append("schema" in json.dumps(request.body))
        rejected = {"error": "response", "message": "This response_format type is unavailable now"}
        return rejected if asked[-1] else {"text": json.dumps(ANSWER)}

    form = response_format("city", CITY)
    async with ModelServer(reply) as server:
        client = client_of(wire, server.url)
        replies = [await client.generate(messages=HI, response_format=form) for _ in range(2)]
        await client.aclose()
        with pytest.raises(LLMResponseError, match="unavailable now"):
            await ask(client_of(wire, server.url, structured_output="json_schema"), response_format=form)

    assert [json.loads(each.output_text) for each in replies] == [ANSWER, ANSWER]
    assert asked == [True, False, False, True]


# --- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "options", "problem"),
    [
        (ANTHROPIC, {"temperature": 1.5}, "llm.temperature: this provider accepts 0 to 1"),
        (ANTHROPIC, {"anthropic_version": "2026-10-21", "top_k": 3}, "llm.top_k: version 2026-10-21"),
        (ANTHROPIC, {"thinking": {"type": "enabled"}}, "llm.thinking: budget_tokens must be a number"),
        (ANTHROPIC, {"thinking": {"type": "on"}}, "llm.thinking: its type is not enabled"),
        (
            ANTHROPIC,
            {"thinking": {"type": "adaptive"}, "temperature": 0.5},
            "llm.temperature: with thinking, the API accepts only 1",
        ),
        (
            ANTHROPIC,
            {"thinking": {"type": "enabled", "budget_tokens": 4096}, "max_tokens": 4096},
            "llm.max_tokens: it must be greater than thinking.budget_tokens",
        ),
        (ANTHROPIC, {"structured_output": "json_object"}, "llm.structured_output: this provider has no JSON"),
        (ANTHROPIC, {"top_p": "a lot"}, "llm.top_p: "),
        (ANTHROPIC, {"stop_sequence": ["x"]}, "did you mean 'stop_sequences'?"),
        (RESPONSES, {"structured_output": "tool"}, "llm.structured_output: this provider needs no tool"),
        (RESPONSES, {"reasoning_efort": "low"}, "did you mean 'reasoning_effort'?"),
        (RESPONSES, {"background": "yes please"}, "llm.background: "),
        (RESPONSES, {"stream_endpoint": "x"}, "llm.stream_endpoint: this provider has one URL"),
        (RESPONSES, {"extra_headers": {"a b": "c"}}, "llm.extra_headers"),
    ],
)
def test_an_option_that_the_provider_does_not_take_is_a_problem(
    wire: Format, options: dict[str, Any], problem: str
) -> None:
    """It is found when the agents file is read, and names the option."""
    with pytest.raises(PluginConfigError) as caught:
        client_of(wire, "http://x.test/v1", **options)

    assert problem in str(caught.value)


CHOSEN: dict[str, dict[str, Any]] = {
    "openai_compatible": {"tool_choice": "auto", "logprobs": True, "moderation": {"model": "m"}},
    "openai_responses": {
        "access_programs": {"x": True},
        "background": True,
        "background_options": {"completion_window": "2h"},
        "context_management": [{"type": "compaction"}],
        "image": {"detail": "low"},
        "include_obfuscation": False,
        "max_tool_calls": 3,
        "moderation": {"model": "m"},
        "prompt_cache_options": {"mode": "explicit"},
        "tool_choice": "auto",
        "top_logprobs": 3,
    },
    "anthropic": {
        "container": "c",
        "diagnostics": {"previous_message_id": None},
        "effort": "low",
        "inference_geo": "eu",
        "speed": "fast",
        "tool_choice": "auto",
        "top_k": 3,
        "user_profile_id": "u",
    },
}


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
def test_the_test_server_accepts_every_option(wire: Format) -> None:
    """It is as strict as the provider about unknown fields, so it has to know those of our options."""
    client: Any = client_of(wire, "http://x.test/v1", **CHOSEN[wire.provider])
    wire.check(client._codec.body(Request(HI, tools=TOOLS, on_delta=Heard()), wire.model))


@pytest.mark.parametrize(("is_streamed", "sent"), [(True, {"include_obfuscation": False}), (False, None)])
def test_the_obfuscation_of_a_stream_can_be_turned_off(is_streamed: bool, sent: Any) -> None:
    """It fills up every event of OpenAI's responses; the API rejects the option without a stream."""
    codec = OpenAIResponses(LLMOptions(), ResponsesExtras(include_obfuscation=False))
    request = Request(HI, on_delta=Heard() if is_streamed else None)

    assert codec.body(request, "gpt-5").get("stream_options") == sent


def test_every_option_is_sent_where_the_provider_expects_it() -> None:
    """The names of the options are those of the providers."""

    def body(provider: str, **options: Any) -> dict[str, Any]:
        client: Any = make_client(
            LLMOptions(provider=provider, **options), env={"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"}
        )
        made: dict[str, Any] = client._codec.body(Request(HI, tools=TOOLS), "m")
        return made

    anthropic = body(
        "anthropic",
        thinking={"type": "enabled", "budget_tokens": 2048},
        effort="low",
        stop_sequences=["END"],
        service_tier="auto",
        metadata={"user_id": "u"},
        parallel_tool_calls=False,
        cache_ttl="1h",
        container="container_1",
        inference_geo="eu",
        user_profile_id="uprof_1",
        diagnostics={"previous_message_id": None},
    )
    assert anthropic["max_tokens"] == 8_192 + 2_048
    assert (anthropic["container"], anthropic["inference_geo"]) == ("container_1", "eu")
    assert (anthropic["user_profile_id"], anthropic["diagnostics"]["previous_message_id"]) == (
        "uprof_1",
        None,
    )
    assert (anthropic["output_config"], anthropic["stop_sequences"]) == ({"effort": "low"}, ["END"])
    assert anthropic["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}
    assert anthropic["tools"][-1]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}

    unchanged = {
        "access_programs": {"x": True},
        "context_management": [{"type": "compaction"}],
        "image": {"detail": "low"},
        "moderation": {"model": "omni-moderation-latest"},
        "prompt": {"id": "pmpt_1"},
        "prompt_cache_options": {"mode": "explicit"},
        "top_logprobs": 3,
    }
    responses = body(
        "openai_responses",
        reasoning_effort="low",
        reasoning_summary="auto",
        verbosity="low",
        max_tokens=5,
        prompt_cache_key="k",
        service_tier="flex",
        reasoning_model=True,
        temperature=0.5,
        tool_choice="required",
        **unchanged,
    )
    assert unchanged.items() <= responses.items()
    assert responses["tool_choice"] == "required"
    named = {"type": "function", "function": {"name": "add"}}
    assert body("anthropic", tool_choice="required")["tool_choice"] == {"type": "any"}
    assert body("anthropic", tool_choice=named)["tool_choice"] == {"type": "tool", "name": "add"}
    assert body("openai_responses", tool_choice=named)["tool_choice"] == {"type": "function", "name": "add"}
    assert responses["reasoning"] == {"effort": "low", "summary": "auto"}
    assert (responses["text"], responses["max_output_tokens"]) == ({"verbosity": "low"}, 16)
    assert (responses["store"], responses["include"]) == (False, ["reasoning.encrypted_content"])
    assert "temperature" not in responses


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("https://api.anthropic.com", "https://api.anthropic.com/v1/messages"),
        ("https://api.anthropic.com/v1/", "https://api.anthropic.com/v1/messages"),
        ("https://api.deepseek.com/anthropic", "https://api.deepseek.com/anthropic/v1/messages"),
        ("https://x.test/own/messages?api-version=2", "https://x.test/own/messages?api-version=2"),
    ],
)
def test_the_url_of_anthropics_api_is_written_as_its_packages_take_it(base: str, url: str) -> None:
    """With or without the version; a query is kept."""
    client: Any = client_of(ANTHROPIC, base)

    assert client.url == url
