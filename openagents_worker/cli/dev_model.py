"""The scripted model of `openagents-worker dev` if there is no API key. The only place for its replies."""

from __future__ import annotations

import re
from typing import Any

from openagents_worker.testing.model_server import ModelServerRequest

__all__ = ["reply"]

MAX_SEARCHED_CHARS = 2_000  # the time of the search grows with the square of the length of the text
_SUM = re.compile(r"\d[\d.\s]*(?:[-+*/%]\s*[\d.(][\d.()\s]*)+")


def reply(request: ModelServerRequest) -> dict[str, Any]:
    """Reply to one request: call the tool `calc` for arithmetic, or return the result of a tool, or explain.

    >>> reply(ModelServerRequest([{"role": "user", "content": "hi"}], [], "m", False, {}, 0, {}))["text"][:15]
    'You said: hi\\n\\nI'
    """
    last = request.messages[-1]
    if last.get("role") == "tool":
        return {"text": f"The tool returned: {last.get('content')}"}
    text = next((str(m.get("content")) for m in reversed(request.messages) if m.get("role") == "user"), "")
    found = _SUM.search(text[:MAX_SEARCHED_CHARS])
    if found and "calc" in {tool["function"]["name"] for tool in request.tools}:
        return {"tool_calls": [{"name": "calc", "arguments": {"expression": found.group().strip()}}]}
    return {
        "text": f"You said: {text}\n\nI am a script, not a model. Ask me for 17*23, or set OPENAI_API_KEY."
    }
