"""Opaque fields that a provider refuses: the request is repeated without them, and the run goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import LLMResponseError
from openagents_worker.llm.conversation import assistant_message
from tests.unit.llm.raw_server import JSON, Sent, answering, whole
from tests.unit.llm.wire import ANTHROPIC, CHAT, HI, RESPONSES, TOOLS, Format, ask, client_of

CHANGED_PREFIX = (
    "messages.1.content.0: Invalid `signature` in `thinking` block. The block is bound to a different "
    "conversation. Remove the block, or set `thinking.block_binding.prefix_mismatch_behavior` to drop_block."
)
OF_GROQ = (
    "'messages.1' : for 'role:assistant' the following must be satisfied[('messages.1' : property"
    " 'reasoning_content' is unsupported)]"
)
OF_MISTRAL = {
    "detail": [
        {
            "type": "extra_forbidden",
            "loc": ["body", "messages", 1, "assistant", "reasoning_content"],
            "msg": "Extra inputs are not permitted",
        }
    ]
}
OF_OPENAI = {
    "message": "The encrypted content gAAA...ng== could not be verified.",
    "type": "invalid_request_error",
    "code": "invalid_encrypted_content",
}


def turn(name: str) -> list[dict[str, Any]]:
    """A message with a call and with the opaque fields of every wire format, and its result."""
    reasoning = [
        {"type": "reasoning", "text": "hm", "signature": f"sig-{name}", "format": "anthropic_messages"},
        {"type": "reasoning", "text": "", "encrypted": f"enc-{name}", "id": "rs_1", "format": "responses"},
    ]
    call = {"id": f"call_{name}", "name": "add", "arguments": {}}
    call["provider_fields"] = {"chat_completions": {"extra_content": f"google-{name}"}}
    fields = {"chat_completions": {"reasoning_content": f"thought-{name}"}}
    return [
        {
            "role": "assistant",
            "content": [*reasoning, {"type": "text", "text": "I add."}],
            "tool_calls": [call],
            "provider_fields": fields,
        },
        {"role": "tool", "tool_call_id": f"call_{name}", "name": "add", "content": "3"},
    ]


CONVERSATION = [*HI, *turn("old"), {"role": "assistant", "content": "3"}, *HI, *turn("new")]
MARKS: dict[str, tuple[str, ...]] = {
    "openai_compatible": ("thought-", "google-"),
    "anthropic": ("sig-",),
    "openai_responses": ("enc-",),
}
REPLIES: dict[str, dict[str, Any]] = {
    "openai_compatible": whole(content="done"),
    "anthropic": {
        "type": "message",
        "content": [{"type": "text", "text": "done"}],
        "stop_reason": "end_turn",
    },
    "openai_responses": {
        "object": "response",
        "status": "completed",
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "done"}]}],
    },
}


class Server:
    """Refuses every request in which a text occurs, as its provider does."""

    def __init__(self, wire: Format, refused: str, error: Any, status: str = "400 Bad Request") -> None:
        self._wire, self._refused, self._error, self._status = wire, refused, error, status
        self.asked: list[str] = []

    def __call__(self, body: Any) -> Sent:
        self.asked.append(json.dumps(body))
        if self._refused in self.asked[-1]:
            return Sent((json.dumps(self._error).encode(),), JSON, self._status)
        return Sent((json.dumps(REPLIES[self._wire.provider]).encode(),), JSON)

    def seen(self, turn_name: str) -> list[bool]:
        """Whether each request had the opaque fields of this turn."""
        marks = [mark + turn_name for mark in MARKS[self._wire.provider]]
        return [any(mark in text for mark in marks) for text in self.asked]


CASES = [
    pytest.param(
        ANTHROPIC, {"type": "error", "error": {"message": CHANGED_PREFIX}}, id="Anthropic: another prefix"
    ),
    pytest.param(CHAT, {"error": {"message": OF_GROQ}}, id="Groq"),
    pytest.param(
        CHAT, {"object": "error", "message": OF_MISTRAL, "type": "invalid_request_error"}, id="Mistral"
    ),
    pytest.param(RESPONSES, {"error": OF_OPENAI}, id="OpenAI: another account"),
]


@pytest.mark.parametrize(("wire", "error"), CASES)
async def test_fields_of_earlier_turns_are_left_out_if_they_are_refused(wire: Format, error: Any) -> None:
    """The current turn keeps its own, which its provider wants back. The next call does not try again."""
    status = "422 Unprocessable Entity" if wire is CHAT else "400 Bad Request"
    server = Server(wire, f"{MARKS[wire.provider][0]}old", error, status)
    async with answering(server) as url:
        client = client_of(wire, url, retry={"max_attempts": 1})
        first = await client.generate(messages=list(CONVERSATION), tools=TOOLS)
        again = await ask(client, CONVERSATION, tools=TOOLS)

    assert (first.output_text, again.output_text) == ("done", "done")
    assert server.seen("old") == [True, False, False]
    assert server.seen("new") == [True, True, True]


@pytest.mark.parametrize(("wire", "error"), CASES)
async def test_all_fields_are_left_out_if_those_of_the_turn_are_refused_too(wire: Format, error: Any) -> None:
    """For example after a fallback to another provider between two calls of a turn."""
    mark = MARKS[wire.provider][0]
    server = Server(wire, mark, error)
    async with answering(server) as url:
        reply = await ask(client_of(wire, url, retry={"max_attempts": 1}), CONVERSATION, tools=TOOLS)

    assert reply.output_text == "done"
    assert (server.seen("old"), server.seen("new")) == ([True, False, False], [True, True, False])


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "messages.1.extra_content is missing"}},
        {"error": {"message": "the temperature is too high"}},
    ],
)
async def test_another_error_is_raised_at_once(error: Any) -> None:
    """Also that a provider misses a field of which nothing is known: fewer of them cannot help."""
    server = Server(CHAT, "thought-", error)
    async with answering(server) as url:
        with pytest.raises(LLMResponseError):
            await ask(client_of(CHAT, url), CONVERSATION, tools=TOOLS)

    assert len(server.asked) == 1


async def test_a_conversation_without_such_fields_is_not_repeated() -> None:
    server = Server(CHAT, "hi", {"error": {"message": OF_GROQ}})
    async with answering(server) as url:
        with pytest.raises(LLMResponseError) as caught:
            await ask(client_of(CHAT, url))

    assert (len(server.asked), caught.value.requests) == (1, 1)


async def test_where_a_call_comes_from_is_sent_in_any_case() -> None:
    """The program or the namespace of a call, which its provider demands."""
    call: dict[str, Any] = {"id": "c", "name": "add", "arguments": {}}
    call["provider_fields"] = {"responses": {"namespace": "crm"}, "chat_completions": {"extra_content": 1}}
    hidden = {"type": "reasoning", "encrypted": "enc-old", "id": "rs_1", "format": "responses"}
    messages = [
        *HI,
        {"role": "assistant", "content": [hidden], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        *HI,
    ]
    server = Server(RESPONSES, "enc-", {"error": OF_OPENAI})
    async with answering(server) as url:
        await ask(client_of(RESPONSES, url), messages, tools=TOOLS)

    item = next(each for each in json.loads(server.asked[-1])["input"] if each.get("type") == "function_call")
    assert (len(server.asked), item["namespace"]) == (2, "crm")


CALL_OF_ANTHROPIC = {"type": "tool_use", "name": "add", "input": {}}
OF_KIMI = "thinking is enabled but reasoning_content is missing in assistant tool call message at index 1"
OF_DEEPSEEK = "The `reasoning_content` in the thinking mode must be passed back to the API."
OF_GEMINI = "Function call is missing a thought_signature in functionCall parts. This is required for tools."
SKIP = "skip_thought_signature_validator"


@pytest.mark.parametrize(
    ("message", "placeholder"),
    [(OF_KIMI, '"reasoning_content": "."'), (OF_DEEPSEEK, '"reasoning_content": "."'), (OF_GEMINI, SKIP)],
    ids=["Kimi", "DeepSeek", "Gemini"],
)
async def test_a_field_that_only_this_provider_wants_gets_a_placeholder(
    message: str, placeholder: str
) -> None:
    """Another model has written the calls: before a fallback, or before the agent got this model."""
    asked: list[str] = []
    call = {"id": "c", "name": "add", "arguments": {}}
    said = {"role": "assistant", "content": "", "tool_calls": [call, {**call, "id": "d"}]}
    results = [{"role": "tool", "tool_call_id": name, "content": "3"} for name in "cd"]
    own = {"id": "e", "name": "add", "arguments": {}}
    own["provider_fields"] = {"chat_completions": {"extra_content": {"google": {"thought_signature": "sig"}}}}
    fields = {"chat_completions": {"reasoning_content": "hm"}}
    of_this = {"role": "assistant", "content": "", "tool_calls": [own], "provider_fields": fields}
    conversation = [*HI, said, *results, of_this, {"role": "tool", "tool_call_id": "e", "content": "4"}]

    def reply(body: Any) -> Sent:
        asked.append(json.dumps(body))
        if placeholder in asked[-1]:
            return Sent((json.dumps(whole(content="done")).encode(),), JSON)
        return Sent((json.dumps({"error": {"message": message}}).encode(),), JSON, "400 Bad Request")

    async with answering(reply) as url:
        client = client_of(CHAT, url, retry={"max_attempts": 1})
        first = await client.generate(messages=list(conversation), tools=TOOLS)
        again = await ask(client, conversation, tools=TOOLS)

    assert (first.output_text, again.output_text) == ("done", "done")
    assert [text.count(placeholder) for text in asked] == [0, 1, 1]
    assert all(text.count('"hm"') == text.count('"sig"') == 1 for text in asked)


async def test_the_door_of_deepseek_in_anthropics_format_gets_thinking_too() -> None:
    """On each reply that has none. What the model has written itself goes back, also without a signature."""
    asked: list[Any] = []
    call = {"id": "c", "name": "add", "arguments": {}}
    of_another = {"role": "assistant", "content": "I add.", "tool_calls": [call]}
    thought = {"type": "thinking", "thinking": "hm"}
    own = {
        "type": "message",
        "stop_reason": "tool_use",
        "content": [thought, {**CALL_OF_ANTHROPIC, "id": "d"}],
    }
    done = REPLIES["anthropic"]
    missing = {
        "error": {"message": "The `content[].thinking` in the thinking mode must be passed back to the API."}
    }

    def reply(body: Any) -> Sent:
        asked.append(body)
        said = [message["content"] for message in body["messages"] if message["role"] == "assistant"]
        if not all(any(block["type"] == "thinking" for block in blocks) for blocks in said):
            return Sent((json.dumps(missing).encode(),), JSON, "400 Bad Request")
        return Sent((json.dumps(own if len(said) == 1 else done).encode(),), JSON)

    async with answering(reply) as url:
        client = client_of(ANTHROPIC, url, retry={"max_attempts": 1})
        messages = [*HI, of_another, {"role": "tool", "tool_call_id": "c", "content": "3"}]
        first = await client.generate(messages=list(messages), tools=TOOLS)
        messages += [assistant_message(first, first.tool_calls)]
        messages += [{"role": "tool", "tool_call_id": "d", "content": "4"}]
        second = await ask(client, messages, tools=TOOLS)

    thinking = [
        [block["thinking"] for block in message["content"] if block["type"] == "thinking"]
        for message in asked[-1]["messages"]
        if message["role"] == "assistant"
    ]
    assert (len(asked), second.output_text, thinking) == (3, "done", [["."], ["hm"]])


async def test_calls_in_the_format_of_chat_completions_get_the_placeholder_too() -> None:
    """A pattern that was written for this provider keeps its messages as they are on the wire."""
    asked: list[Any] = []
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}

    def reply(body: Any) -> Sent:
        asked.append(body)
        if SKIP in json.dumps(body):
            return Sent((json.dumps(whole(content="done")).encode(),), JSON)
        return Sent((json.dumps({"error": {"message": OF_GEMINI}}).encode(),), JSON, "400 Bad Request")

    async with answering(reply) as url:
        await ask(client_of(CHAT, url), [*HI, said, {"role": "tool", "tool_call_id": "c", "content": "3"}])

    (sent,) = asked[-1]["messages"][1]["tool_calls"]
    assert sent == {**call, "extra_content": {"google": {"thought_signature": SKIP}}}


@pytest.mark.parametrize("refused", [False, True], ids=["misses", "misses what it refuses"])
async def test_a_provider_that_is_never_content_is_not_asked_for_ever(refused: bool) -> None:
    asked: list[Any] = []

    def reply(body: Any) -> Sent:
        asked.append(body)
        message = OF_GROQ if refused and "reasoning_content" in json.dumps(body) else OF_KIMI
        return Sent((json.dumps({"error": {"message": message}}).encode(),), JSON, "400 Bad Request")

    async with answering(reply) as url:
        with pytest.raises(LLMResponseError):
            await ask(client_of(CHAT, url), [*HI, {"role": "assistant", "content": "hi"}, *HI])

    assert len(asked) == (5 if refused else 2)


SEARCHED = [
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "oslo"}},
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
    {"type": "text", "text": "It rains."},
]
CALLED = [
    {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    {"type": "text", "text": "It rains."},
]
FOREIGN = {
    "DeepSeek": (CHAT, SEARCHED, "messages[1]: unknown variant `server_tool_use`, expected `text` at line 1"),
    "OpenAI": (RESPONSES, SEARCHED, "Invalid value: 'server_tool_use'. Supported values are: 'message'."),
    "Anthropic": (
        ANTHROPIC,
        CALLED,
        "Input tag 'web_search_call' found using 'type' does not match any tags",
    ),
    "Anthropic's format": (ANTHROPIC, SEARCHED, "messages.content.type: invalid value: `server_tool_use`"),
}


@pytest.mark.parametrize(("wire", "content", "error"), FOREIGN.values(), ids=FOREIGN)
async def test_blocks_of_the_tools_of_another_provider_are_left_out_if_they_are_refused(
    wire: Format, content: list[dict[str, Any]], error: str
) -> None:
    """For example after a handoff to an agent with another model. What the model said is kept."""
    server = Server(wire, content[0]["type"], {"error": {"message": error}})
    fields = {wire.provider: {"calls_at": [1]}}
    searched = {"role": "assistant", "content": content, "provider_fields": fields}
    only_searched = {"role": "assistant", "content": content[:-1]}
    async with answering(server) as url:
        client = client_of(wire, url, retry={"max_attempts": 1})
        first = await ask(client, [*HI, searched, *HI, only_searched, *HI])
        again = await ask(client, [*HI, searched, *HI, only_searched, *HI, *turn("new")], tools=TOOLS)

    assert (first.output_text, again.output_text) == ("done", "done")
    refused, shorter, later = server.asked
    assert content[0]["type"] in refused
    assert all("It rains." in text and "web_search_tool_result" not in text for text in (shorter, later))
    assert "sig-new" in later or "thought-new" in later or "enc-new" in later


async def test_blocks_and_fields_may_both_be_refused() -> None:
    asked: list[str] = []

    def reply(body: Any) -> Sent:
        asked.append(json.dumps(body))
        for mark, message in {
            "server_tool_use": "Unknown part type: server_tool_use",
            "thought-": OF_GROQ,
        }.items():
            if mark in asked[-1]:
                return Sent((json.dumps({"error": {"message": message}}).encode(),), JSON, "400 Bad Request")
        return Sent((json.dumps(whole(content="done")).encode(),), JSON)

    messages = [*HI, {"role": "assistant", "content": SEARCHED}, *HI, *turn("old"), *HI]
    async with answering(reply) as url:
        client = client_of(CHAT, url, retry={"max_attempts": 1})
        for _ in range(2):
            assert (await ask(client, messages, tools=TOOLS)).output_text == "done"

    assert len(asked) == 4
    assert "It rains." in asked[-1]


async def test_blocks_that_the_error_names_as_supported_are_kept() -> None:
    error = "Invalid value: 'server_tool_use'. Supported values are: 'message' and 'web_search_call'."
    server = Server(RESPONSES, "server_tool_use", {"error": {"message": error}})
    messages = [
        *HI,
        {"role": "assistant", "content": CALLED},
        *HI,
        {"role": "assistant", "content": SEARCHED},
    ]
    async with answering(server) as url:
        await ask(client_of(RESPONSES, url), [*messages, *HI])

    assert ["web_search_call" in text for text in server.asked] == [True, True]


async def test_calls_in_the_format_of_a_provider_are_no_blocks_of_its_tools() -> None:
    """A pattern may write them. An error about them is a mistake of the pattern."""
    error = "messages.1: `tool_use` ids were found without `tool_result` blocks"
    server = Server(ANTHROPIC, "hi", {"error": {"message": error}})
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {}}]}
    async with answering(server) as url:
        with pytest.raises(LLMResponseError, match="without"):
            await ask(client_of(ANTHROPIC, url), [*HI, called, *HI])

    assert len(server.asked) == 1


async def test_a_type_that_no_reply_has_is_not_left_out() -> None:
    server = Server(CHAT, "hi", {"error": {"message": "Unknown part type: video"}})
    shown = {"role": "user", "content": [{"type": "video", "url": "x"}, {"type": "text", "text": "hi"}]}
    async with answering(server) as url:
        with pytest.raises(LLMResponseError, match="video"):
            await ask(client_of(CHAT, url), [shown, {"role": "assistant", "content": SEARCHED}, *HI])

    assert len(server.asked) == 1


async def test_the_tools_of_earlier_calls_are_declared_if_a_gateway_demands_it() -> None:
    """LiteLLM's proxy does for Claude and Bedrock. Requests without calls are sent as they are."""
    asked: list[list[str]] = []

    def reply(body: Any) -> Sent:
        names = [tool["function"]["name"] for tool in body.get("tools", ())]
        asked.append(names)
        if not names and "tool_calls" in json.dumps(body):
            text = "Anthropic doesn't support tool calling without `tools=` param specified."
            return Sent((json.dumps({"error": {"message": text}}).encode(),), JSON, "400 Bad Request")
        return Sent((json.dumps(whole(content="done")).encode(),), JSON)

    async with answering(reply) as url:
        client = client_of(CHAT, url)
        for messages in (CONVERSATION, CONVERSATION, HI):
            assert (await client.generate(messages=list(messages))).output_text == "done"
        await client.aclose()

    assert asked == [[], ["add"], ["add"], []]
