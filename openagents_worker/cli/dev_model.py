"""The model of `openagents-worker dev` without a key. The only place for what it says."""

from __future__ import annotations

import re
from typing import Any

from openagents_worker.testing.model_server import ModelRequest

__all__ = ["reply"]

MAX_SEARCHED_CHARS = 2_000  # a sum stands in a short text; the search takes the square of its length
_SUM = re.compile(r"\d[\d.\s]*(?:[-+*/%]\s*[\d.(][\d.()\s]*)+")


def reply(request: ModelRequest) -> dict[str, Any]:
    """One turn: call `calc` for arithmetic, answer from what a tool said, or explain where one is.

    >>> reply(ModelRequest([{"role": "user", "content": "hi"}], [], "m", False, {}, 0, {}))["text"][:15]
    'You said: hi\\n\\nI'
    """
    last = request.messages[-1]
    if last.get("role") == "tool":
        return {"text": f"The tool says: {last.get('content')}"}
    text = next((str(m.get("content")) for m in reversed(request.messages) if m.get("role") == "user"), "")
    found = _SUM.search(text[:MAX_SEARCHED_CHARS])
    if found and "calc" in {tool["function"]["name"] for tool in request.tools}:
        return {"tool_calls": [{"name": "calc", "arguments": {"expression": found.group().strip()}}]}
    return {
        "text": f"You said: {text}\n\nI am a script, not a model. Ask me for 17*23, or set OPENAI_API_KEY."
    }
