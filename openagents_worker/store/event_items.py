"""Event items: the only place that defines how events travel to a script.

Scripts do not read payloads. What they need of one travels in the name: the call whose streamed reply an
event ends, and the place of a piece of a reply. Such a name begins with a character that no other name begins
with. `append` in `lua/lib/run.lua` is the reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from openagents_worker.jsontext import LARGEST_COUNT, dumps, loads
from openagents_worker.store.codec import PayloadCodec

__all__ = ["event_items"]

DELTA = "llm.delta"
ENDS_A_REPLY = frozenset({"llm.succeeded", "llm.failed"})
_MARK = "\x1f"


def event_items(events: Sequence[str], codec: PayloadCodec) -> list[str]:
    """The argument of a script for these events: name, payload (JSON), name, payload …

    >>> from openagents_worker.store.codec import PLAIN
    >>> event_items(["tool.called", "{}", "llm.failed", '{"call":"m:1"}'], PLAIN)
    ['tool.called', '{}', '\\x1fllm.failed\\x1fm:1', '{"call":"m:1"}']
    """
    items: list[str] = []
    for name, payload in zip(events[::2], events[1::2], strict=True):
        items += _item(name, payload, codec)
    return items


def _item(name: str, payload: str, codec: PayloadCodec) -> Iterator[str]:
    if name == DELTA and (piece := _piece(payload)) is not None:
        text = piece.pop("text")
        place = (DELTA, str(piece["offset"]), str(len(text)), piece["call"], dumps(piece))
        yield _MARK + _MARK.join(place)
        yield codec.encode(text)
        return
    call = _call_of(payload) if name in ENDS_A_REPLY else None
    yield name.lstrip(_MARK) if call is None else f"{_MARK}{name}{_MARK}{call}"
    yield codec.encode(payload)


def _piece(payload: str) -> dict[str, Any] | None:
    """The fields of a piece of a reply. None if the payload is that of another program's event."""
    fields = _fields(payload)
    call, offset, text = fields.get("call"), fields.get("offset"), fields.get("text")
    if not (isinstance(call, str) and isinstance(text, str) and type(offset) is int):
        return None
    return fields if 0 <= offset <= LARGEST_COUNT and text else None


def _call_of(payload: str) -> str | None:
    call = _fields(payload).get("call")
    return call if isinstance(call, str) else None


def _fields(payload: str) -> dict[str, Any]:
    try:
        fields = loads(payload)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
