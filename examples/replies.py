"""What the scripted models of the examples share: they read the results of a run's tools, and call tools.

Such a model is a function of the request, so it answers a repeated request in the same way.
"""

from __future__ import annotations

import json
from typing import Any

from openagents_worker.testing.model_server import ModelServerRequest

__all__ = ["call", "question", "results"]


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A tool call, in the form of the model server."""
    return {"name": name, "arguments": arguments}


def question(request: ModelServerRequest) -> str:
    """The last text of the user."""
    return next(str(m["content"]) for m in reversed(request.messages) if m["role"] == "user")


def results(request: ModelServerRequest, tool: str) -> list[Any]:
    """The results of this tool in this run, oldest first. Messages before the last question are ignored.

    The result of a call that failed or was denied has the keys `error` (a code) and `message`.
    """
    roles = [message["role"] for message in request.messages]
    messages = request.messages[len(roles) - roles[::-1].index("user") :]
    called = {
        made["id"]: made["function"]["name"]
        for message in messages
        for made in message.get("tool_calls") or ()
    }
    return [
        _value(message["content"])
        for message in messages
        if message["role"] == "tool" and called.get(message["tool_call_id"]) == tool
    ]


def _value(content: str) -> Any:
    """What a tool has returned: JSON, or a text."""
    try:
        return json.loads(content)
    except ValueError:
        return content
