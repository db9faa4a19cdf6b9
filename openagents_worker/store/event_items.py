"""Event items: the only place that defines how events travel to a script.

Scripts do not read payloads. What they need of one travels in the name: the call whose streamed reply an
event ends, and the place and the text of a piece of a reply. Such a name begins with a character that no
other name begins with. `append` in `lua/lib/run.lua` is the reader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openagents_worker.jsontext import LARGEST_COUNT, loads
from openagents_worker.store.codec import PayloadCodec

__all__ = ["event_items"]

DELTA = "llm.delta"
ENDS_A_REPLY = frozenset({"llm.succeeded", "llm.failed"})
_MARK = "\x1f"
_WITH_A_PLACE = {DELTA, *ENDS_A_REPLY}
# Quotes inside of a JSON string are escaped, so this is a field.
_CALL = re.compile(r'"call":"([^"\\]*)"')


def event_items(events: Sequence[str], codec: PayloadCodec) -> Sequence[str]:
    """The argument of a script for these events: name, payload (JSON), name, payload …

    >>> from openagents_worker.store.codec import PLAIN
    >>> event_items(["tool.called", "{}", "llm.failed", '{"call":"m:1"}'], PLAIN)
    ['tool.called', '{}', '\\x1fllm.failed\\x1fm:1', '{"call":"m:1"}']
    """
    items = list(events)
    for at in range(0, len(items), 2):
        name = items[at]
        if name in _WITH_A_PLACE or name.startswith(_MARK):
            items[at] = _marked(name, items[at + 1], codec)
    if not codec.is_plain:
        items[1::2] = map(codec.encode, items[1::2])
    return items


def _marked(name: str, payload: str, codec: PayloadCodec) -> str:
    """The name for the script, with what it needs of the payload."""
    if name == DELTA and (piece := _piece(payload)) is not None:
        call, offset, text = piece
        place = (DELTA, str(offset), str(len(text)), str(len(call.encode())), call)
        return _MARK + _MARK.join(place) + codec.encode(text)
    call_that_ends = _call_of(payload) if name in ENDS_A_REPLY else None
    return name.lstrip(_MARK) if call_that_ends is None else f"{_MARK}{name}{_MARK}{call_that_ends}"


def _piece(payload: str) -> tuple[str, int, str] | None:
    """Call, offset and text of a piece of a reply's text. None: another kind, or an event of user code."""
    fields = _fields(payload)
    if fields.get("kind", "text") != "text":
        return None
    call, offset, text = fields.get("call"), fields.get("offset"), fields.get("text")
    if not (isinstance(call, str) and isinstance(text, str) and type(offset) is int):
        return None
    return (call, offset, text) if 0 <= offset <= LARGEST_COUNT and text else None


def _call_of(payload: str) -> str | None:
    """The field `call`. The payload is parsed only if there may be another such field inside of it."""
    found = _CALL.findall(payload)
    if len(found) == 1:
        return str(found[0])
    call = _fields(payload).get("call")
    return call if isinstance(call, str) else None


def _fields(payload: str) -> dict[str, Any]:
    try:
        fields = loads(payload)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
