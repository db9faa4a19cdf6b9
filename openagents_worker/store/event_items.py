"""Event items: the only place that defines how events travel to a script.

Scripts do not read payloads. What they need of one travels in the name: the call whose streamed text an
event ends, and the place and the text of a piece of a reply or of a tool's output. Such a name begins with a
character that no other name begins with. `append` in `lua/lib/run.lua` is the reader.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openagents_worker.jsontext import LARGEST_COUNT, loads
from openagents_worker.store.codec import PayloadCodec

__all__ = ["event_items"]

CALL_FIELDS = {"llm.delta": "call", "tool.delta": "call_id"}
"""The events with pieces of a text, and the field that names the call to which the text belongs."""
ENDS_A_REPLY = frozenset({"llm.succeeded", "llm.failed"})
ENDS_AN_OUTPUT = frozenset({"tool.succeeded", "tool.failed"})
"""Events that end the output of a tool, if it was streamed: then they have the field `streamed`."""
_MARK = "\x1f"
_WITH_A_PLACE = {*CALL_FIELDS, *ENDS_A_REPLY}
_STREAMED = '"streamed":true'
# Quotes inside of a JSON string are escaped, so this is a field.
_PLAIN = r'"([^"\\\x00-\x1f]*)"'
_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
_PIECE_AS_WRITTEN = {
    name: re.compile(
        rf'{{"{field}":{_PLAIN},"attempt":{_NUMBER},"offset":({_NUMBER}),"text":{_PLAIN}(?:,"kind":"text")?}}'
    )
    for name, field in CALL_FIELDS.items()
}
"""A piece as this library writes it, without escaped characters: it need not be parsed as JSON."""
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
        if (
            name in _WITH_A_PLACE
            or name.startswith(_MARK)
            or (name in ENDS_AN_OUTPUT and _STREAMED in items[at + 1])
        ):
            items[at] = _marked(name, items[at + 1], codec)
    if not codec.is_plain:
        items[1::2] = map(codec.encode, items[1::2])
    return items


def _marked(name: str, payload: str, codec: PayloadCodec) -> str:
    """The name for the script, with what it needs of the payload."""
    if name in CALL_FIELDS and (piece := _piece(name, payload)) is not None:
        call, offset, text = piece
        place = (name, str(offset), str(len(text)), str(len(call.encode())), call)
        return _MARK + _MARK.join(place) + codec.encode(text)
    call_that_ends = None
    if name in ENDS_A_REPLY:
        call_that_ends = _call_of(payload)
    elif name in ENDS_AN_OUTPUT:
        fields = _fields(payload)
        call_that_ends = _text(fields.get("call_id")) if fields.get("streamed") is True else None
    return name.lstrip(_MARK) if call_that_ends is None else f"{_MARK}{name}{_MARK}{call_that_ends}"


def _piece(name: str, payload: str) -> tuple[str, int, str] | None:
    """Call, offset and text of a piece of a text. None: another kind, or an event of user code."""
    if (found := _PIECE_AS_WRITTEN[name].fullmatch(payload)) is not None:
        place = int(found[2])
        return (found[1], place, found[3]) if place <= LARGEST_COUNT and found[3] else None
    fields = _fields(payload)
    if fields.get("kind", "text") != "text":
        return None
    call, offset, text = fields.get(CALL_FIELDS[name]), fields.get("offset"), fields.get("text")
    if not (isinstance(call, str) and isinstance(text, str) and type(offset) is int):
        return None
    return (call, offset, text) if 0 <= offset <= LARGEST_COUNT and text else None


def _call_of(payload: str) -> str | None:
    """The field `call`. The payload is parsed only if there may be another such field inside of it."""
    found = _CALL.findall(payload)
    if len(found) == 1:
        return str(found[0])
    return _text(_fields(payload).get("call"))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _fields(payload: str) -> dict[str, Any]:
    try:
        fields = loads(payload)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
