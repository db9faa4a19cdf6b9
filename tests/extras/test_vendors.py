"""The vendors' own packages: our requests fit their types, and their clients understand our model server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from openagents_worker.llm.providers import EXTRAS
from openagents_worker.llm.structured import response_format
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.extras.vendor_program import FIELDS, GOLDEN, TALK
from tests.unit.llm.test_conversation import asks, call, result, user
from tests.unit.llm.test_wire_formats import BLOCKS, CITY
from tests.unit.llm.wire import ANTHROPIC, FORMATS, TOOLS, Format

pytestmark = pytest.mark.extras
TIMEOUT_S = 240

WRITTEN = {"messages", "model", "max_tokens", "temperature", "tools", "stream"}
"""Fields that the library writes from the conversation, and from options with names of their own."""
NO_OPTION = {
    "anthropic": {
        "cache_control",  # prompt_caching, cache_ttl
        "output_config",  # effort, structured_output
        "system",
        "workspace_id",  # a header: extra_headers
    },
    "openai_compatible": {
        "functions",  # the old names of tools and tool_choice
        "function_call",
        "max_completion_tokens",  # max_tokens
        "n",  # a reply has one choice
        "response_format",
    },
    "openai_responses": {
        "conversation",  # the conversation is ours, so that any worker can continue it
        "previous_response_id",
        "input",
        "instructions",
        "max_output_tokens",  # max_tokens
        "reasoning",  # reasoning_effort, reasoning_summary
        "stream_options",  # include_obfuscation
        "text",  # verbosity, structured_output
    },
}
"""Fields without an option of the same name, and the option or the reason."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of an environment with the newest packages of the vendors, and nothing of ours."""
    folder = tmp_path_factory.mktemp("vendors")
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = str(folder / "bin" / "python")
    install = ("install", "--quiet", "--disable-pip-version-check", "openai", "anthropic")
    _run(sys.executable, "-m", "pip", "--python", python, *install)
    return python


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _requests(wire: Format) -> dict[str, dict[str, Any]]:
    """Request bodies with everything that a request can have."""
    formats = {"anthropic": "anthropic_messages", "openai_responses": "responses"}
    thought = {
        "type": "reasoning",
        "text": "hm",
        "signature": "s" if wire is ANTHROPIC else "",
        "encrypted": "" if wire is ANTHROPIC else "e",
        "id": "rs_1",
        "format": formats.get(wire.provider, "chat_completions"),
    }
    turn = {**asks(call("a"), call("b")), "content": [thought, {"type": "text", "text": "I add."}]}
    refused = {"role": "assistant", "content": [{"type": "refusal", "text": "No."}]}
    return {
        "text": wire.body([{"role": "system", "content": "Be kind."}, user()], max_tokens=100),
        "blocks": wire.body([user(BLOCKS)]),
        "tools": wire.body([user(), turn, result("a"), result("b", content=BLOCKS[:3])], tools=TOOLS),
        "forced": wire.body([user()], tools=TOOLS, tool_choice="required"),
        "named": wire.body(
            [user()], tools=TOOLS, tool_choice={"type": "function", "function": {"name": "add"}}
        ),
        "refused": wire.body([user(), refused, user()]),
        "output": wire.body([user()], response_format=response_format("city", CITY), temperature=0.5),
    }


def test_our_requests_fit_the_types_of_the_vendors(python: str) -> None:
    """Of their newest packages: fields, types, and what is required."""
    bodies = [(name, wire.provider, body) for wire in FORMATS for name, body in _requests(wire).items()]

    problems = json.loads(_run(python, "-c", GOLDEN, text=json.dumps(bodies)))

    # The API has sampling parameters in its version 2023-06-01, which we send; the package has a newer one.
    assert problems == ["output: anthropic has no ['temperature']"]


TURN = {
    "text": "two words",
    "reasoning": "hm",
    "tool_calls": [{"name": "add"}],
    "usage": {"input_tokens": 100, "output_tokens": 20, "cached_tokens": 40},
}


def test_the_clients_of_the_vendors_understand_the_model_server(python: str) -> None:
    """Whole, streamed, in the background; errors are those of their packages."""

    def reply(request: ModelServerRequest) -> Mapping[str, Any]:
        said = str(request.messages[-1]["content"])
        return TURN if said == "hi" else {"error": said}

    with ModelServer(reply).serve_in_thread() as server:
        found = json.loads(_run(python, "-c", TALK, server.url))

    items = [["reasoning", "message", "function_call"], "two words", 100]
    assert found["responses"] == found["responses streamed"] == found["background"] == items
    assert found["cancelled"] == "completed"
    assert found["messages"] == found["messages streamed"]
    assert found["messages"] == [["thinking", "text", "tool_use"], "tool_use", 40]
    assert found["chat"] == found["chat streamed"] == [["add"], "two words", 100]
    assert [status for _, status in found["rate_limit"]] == [429, 429, 429]
    assert [status for _, status in found["overloaded"]] == [529, 529, 529]
    assert [status for _, status in found["response"]] == [400, 400, 400]
    assert all(found["reset"])
    assert all(found["error_in_200"][1:]), "an error event; OpenAI's package returns response.failed"


def test_every_field_of_a_request_can_be_set(python: str) -> None:
    """As an option of `llm` with a check of its type, unless the library writes it. A field that is new at
    the vendor fails here."""
    fields = json.loads(_run(python, "-c", FIELDS))
    options = {name: {*EXTRAS[name].model_fields, *WRITTEN, *NO_OPTION[name]} for name in fields}

    missing = {name: sorted({*found} - options[name]) for name, found in fields.items()}
    assert missing == {name: [] for name in fields}
