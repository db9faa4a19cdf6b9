"""Servers that refuse what OpenAI accepts: the request is repeated in their form, and the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from openagents_worker.errors import LLMConnectionError, LLMResponseError
from openagents_worker.llm.openai_chat import messages_to_wire
from openagents_worker.llm.strict_servers import StrictForm
from tests.unit.llm.raw_server import JSON, Sent, answering, whole
from tests.unit.llm.wire import CHAT, HI, TOOLS, ask, client_of

Rule = Callable[[dict[str, Any]], str | None]

SYSTEM = {"role": "system", "content": "You add."}
IMAGE = {"type": "image", "data": "AAAA", "media_type": "image/png"}
FOREIGN_ID = "call_PTLP8xhu3uwZk4l3nlnrrJha"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def turn(result: Any = "3", *, text: str = "", call_id: str = FOREIGN_ID) -> list[dict[str, Any]]:
    """A reply with a call, and its result."""
    call = {"id": call_id, "name": "add", "arguments": {"a": 1}}
    return [
        {"role": "assistant", "content": text, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "name": "add", "content": result},
    ]


# --- the rules -------------------------------------------------------------------------------------------


def order_of_mistral(body: dict[str, Any]) -> str | None:
    """As in its library mistral-common."""
    after = {
        "system": ("user", "assistant", "system"),
        "user": ("assistant", "system", "user"),
        "assistant": ("assistant", "user", "tool"),
        "tool": ("assistant", "tool"),
    }
    roles = [message["role"] for message in body["messages"]]
    for before, role in pairwise(roles):
        if role not in after[before]:
            return f"Unexpected role '{role}' after role '{before}'"
    return None


def ids_of_mistral(body: dict[str, Any]) -> str | None:
    for message in body["messages"]:
        for call in message.get("tool_calls", ()):
            if not re.fullmatch("[a-zA-Z0-9]{9}", call["id"]):
                return f"Tool call id was {call['id']} but must be a-z, A-Z, 0-9, with a length of 9."
    return None


def calls_without_text(body: dict[str, Any]) -> str | None:
    has_both = any(each.get("content") and each.get("tool_calls") for each in body["messages"])
    return "Assistant message must have either content or tool_calls, but not both." if has_both else None


def system_first(body: dict[str, Any]) -> str | None:
    """The chat template of Qwen 3.5."""
    late = any(message["role"] == "system" for message in body["messages"][1:])
    return "System message must be at the beginning." if late else None


def alternating(body: dict[str, Any]) -> str | None:
    """The chat templates of Mistral's models."""
    said = [each["role"] for each in body["messages"] if not each.get("tool_calls")]
    said = [role for role in said if role in ("user", "assistant")]
    if any((role == "user") != (at % 2 == 0) for at, role in enumerate(said)):
        return "After the optional system message, conversation roles must alternate user and assistant roles"
    return None


def no_null(body: dict[str, Any]) -> str | None:
    has_null = any(message["content"] is None for message in body["messages"])
    return "invalid message content type: <nil>" if has_null else None


def no_system(body: dict[str, Any]) -> str | None:
    has_system = any(message["role"] == "system" for message in body["messages"])
    return "System role not supported" if has_system else None


def named_results(body: dict[str, Any]) -> str | None:
    """Gemini, behind a server that does not look for the name of the call."""
    if all(message.get("name") for message in body["messages"] if message["role"] == "tool"):
        return None
    return "* GenerateContentRequest.contents[2].parts[0].function_response.name: Name cannot be empty."


def only_text(body: dict[str, Any]) -> str | None:
    if "image_url" not in json.dumps(body):
        return None
    return "Failed to deserialize the JSON body: messages[3]: unknown variant `image_url`, expected `text`"


class Strict:
    """Refuses a request that breaks one of the rules, with the text of the first."""

    def __init__(self, *rules: Rule, status: str = "400 Bad Request") -> None:
        self._rules, self._status = rules, status
        self.asked: list[dict[str, Any]] = []
        self.is_down = False

    def __call__(self, body: Any) -> Sent:
        self.asked.append(body)
        if refusal := next((text for rule in self._rules if (text := rule(body))), None):
            error = {"object": "error", "message": refusal, "type": "invalid_request_error"}
            return Sent((json.dumps(error).encode(),), JSON, self._status)
        if self.is_down:
            return Sent((b"{}",), JSON, "503 Service Unavailable")
        return Sent((json.dumps(whole(content="done")).encode(),), JSON)


STEERED = [SYSTEM, user("1+2"), *turn(), user("Now in French.")]
WITH_IMAGE = [SYSTEM, user("1+2"), *turn([{"type": "text", "text": "See:"}, IMAGE])]
LATER_SYSTEM = [SYSTEM, user("1+2"), {"role": "assistant", "content": "3"}, {**SYSTEM}, user("4+5")]
TWO_QUESTIONS = [SYSTEM, user("1+2"), user("Quickly!"), *turn()]
SPOKEN = [SYSTEM, user("1+2"), *turn(text="I add.")]
SILENT = [SYSTEM, user("1+2"), *turn()]


@pytest.mark.share(of=1)
@pytest.mark.parametrize(
    ("rule", "messages"),
    [
        pytest.param(order_of_mistral, STEERED, id="Mistral: a message was sent to the run"),
        pytest.param(order_of_mistral, WITH_IMAGE, id="Mistral: a tool has returned an image"),
        pytest.param(order_of_mistral, LATER_SYSTEM, id="Mistral: a later system message"),
        pytest.param(ids_of_mistral, SILENT, id="Mistral: another model has made the call"),
        pytest.param(calls_without_text, SPOKEN, id="Mistral: a text with calls"),
        pytest.param(system_first, LATER_SYSTEM, id="Qwen: a later system message"),
        pytest.param(alternating, STEERED, id="alternating roles: a message was sent to the run"),
        pytest.param(alternating, TWO_QUESTIONS, id="alternating roles: two messages of the user"),
        pytest.param(no_null, SILENT, id="Ollama: calls without a text"),
        pytest.param(no_system, SILENT, id="Gemma: a system message"),
        pytest.param(named_results, SILENT, id="Gemini: a result without a name"),
        pytest.param(only_text, WITH_IMAGE, id="DeepSeek: a tool has returned an image"),
    ],
)
async def test_a_conversation_that_breaks_a_rule_of_the_server_is_sent_in_another_form(
    rule: Rule, messages: list[Any]
) -> None:
    """The client remembers the rule: the next call is not refused."""
    server = Strict(rule)
    async with answering(server) as url:
        client = client_of(CHAT, url, retry={"max_attempts": 1})
        first = await client.generate(messages=messages)
        again = await ask(client, [*messages, *turn(), *HI])

    assert (first.output_text, again.output_text) == ("done", "done")
    assert [rule(body) is None for body in server.asked] == [False, True, True]


async def test_mistral_gets_calls_results_and_questions_under_all_its_rules() -> None:
    """Another model has made the calls, one tool has returned an image, and a message was sent to the run."""
    server = Strict(order_of_mistral, ids_of_mistral, calls_without_text, alternating)
    shown = [{"type": "text", "text": "See:"}, IMAGE]
    first = turn(shown, text="I add.", call_id="toolu_1")
    messages = [SYSTEM, user("1+2"), *first, user("In French."), *turn(call_id="abcdEFGH1"), *turn()]
    async with answering(server) as url:
        reply = await ask(client_of(CHAT, url, retry={"max_attempts": 1}), messages, tools=TOOLS)

    assert reply.output_text == "done"
    sent = server.asked[-1]["messages"]
    assert [message["role"] for message in sent] == [
        *("system", "user", "assistant", "tool"),
        *("assistant", "user"),  # the reply between the result and the image with what was sent
        *("assistant", "tool", "assistant", "tool"),
    ]
    called = [call["id"] for message in sent for call in message.get("tool_calls", ())]
    assert called == [message["tool_call_id"] for message in sent if message["role"] == "tool"]
    assert called[1] == "abcdEFGH1"
    assert len(set(called)) == 3
    text = json.dumps(sent)
    for said in ("See:", "AAAA", "In French.", f"Result of the tool call {called[0]}:"):
        assert said in text


async def test_a_model_for_text_learns_that_an_image_is_left_out() -> None:
    """Its text is kept. The image stays in the session, for a model that takes images."""
    server = Strict(only_text)
    async with answering(server) as url:
        await ask(client_of(CHAT, url, retry={"max_attempts": 1}), WITH_IMAGE)

    result = server.asked[-1]["messages"][-1]
    assert (result["role"], result["content"]) == ("tool", "See:[image left out: the model takes no images]")


async def test_a_chat_template_that_answers_500_is_not_taken_for_a_server_that_is_down() -> None:
    """llama.cpp answers so. The request is repeated once, in the form of the template."""
    server = Strict(system_first, status="500 Internal Server Error")
    async with answering(server) as url:
        reply = await ask(client_of(CHAT, url, retry={"max_attempts": 1}), LATER_SYSTEM)

    assert (reply.output_text, len(server.asked)) == ("done", 2)


async def test_the_repeated_request_counts_as_a_try() -> None:
    """`llm.retry.max_attempts` is the limit of all requests for a call."""
    server = Strict(order_of_mistral)
    server.is_down = True
    async with answering(server) as url:
        with pytest.raises(LLMConnectionError) as caught:
            await ask(client_of(CHAT, url, retry={"max_attempts": 3}), STEERED)

    assert (len(server.asked), caught.value.requests) == (3, 3)


async def test_a_server_that_refuses_its_own_form_is_asked_no_third_time() -> None:
    """The error is raised as it is."""
    server = Strict(lambda body: "Unexpected role 'user' after role 'tool'")
    async with answering(server) as url:
        with pytest.raises(LLMResponseError, match="Unexpected role"):
            await ask(client_of(CHAT, url), STEERED)

    assert len(server.asked) == 2


def test_instructions_at_the_beginning_are_one_message() -> None:
    """For each server: no chat template refuses that, and some refuse two."""
    more = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}

    assert messages_to_wire([SYSTEM, {**SYSTEM, "content": "And round."}, *HI])[0] == {
        "role": "system",
        "content": "You add.\n\nAnd round.",
    }
    assert messages_to_wire([SYSTEM, more, *HI])[0]["content"] == [
        {"type": "text", "text": "You add."},
        {"type": "text", "text": "Be brief."},
    ]


def test_later_instructions_keep_their_role_for_other_servers() -> None:
    """Only a server that refuses them gets them as text of the user, marked."""
    assert messages_to_wire(LATER_SYSTEM)[3] == SYSTEM
    assert messages_to_wire(LATER_SYSTEM, [StrictForm.ROLES_IN_ORDER])[3:] == [
        {"role": "user", "content": "<system>\nYou add.\n</system>\n\n4+5"}
    ]
