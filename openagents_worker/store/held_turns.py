"""Held turns: the only place that reads what the shared children of a run have left with it.

A shared child works in the session of its parent, and writes nothing to it when it ends. Its messages,
artifacts and changes of the session state are items of the list `held` of its parent (`lua/lib/held.lua`).
The script that writes the turn of the parent writes these items before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

from openagents_worker.errors import HeldTurnsExpired
from openagents_worker.jsontext import loads
from openagents_worker.models import RunArtifact
from openagents_worker.store.client import Reader
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.paging import PageSize

__all__ = [
    "HELD",
    "HeldRange",
    "HeldTurn",
    "TakenTurns",
    "load_held_turns",
    "ranges_of",
    "state_after",
    "taken_turns",
    "turns_expired",
]

HELD = "held"
"""The key of ranges in records: in the value of a delegation, the turns whose changes of the state it has; in
the context of checkpoint 0, the turns that the run saw when it began."""
FIRST_PAGE_ITEMS = 20  # a message may have a megabyte
MAX_PAGE_ITEMS = 200


class _HeldKind(StrEnum):
    """The first letter of an item."""

    MESSAGE = "m"
    ARTIFACT = "a"
    STATE_KEY = "s"
    STATE_VALUE = "v"
    """The value of the key in the item before it."""
    STATE_REMOVED = "g"
    END_OF_TURN = "t"


@dataclass(frozen=True, slots=True)
class HeldRange:
    """Whole turns in the list `held` of a run: the position of the first item, and that behind the last."""

    run_id: str
    begin: int
    end: int


def ranges_of(fields: Sequence[Any]) -> tuple[HeldRange, ...]:
    """Ranges from the form in which they are stored: run id, begin, end, run id, begin, end …"""
    return tuple(
        HeldRange(str(run_id), int(begin), int(end))
        for run_id, begin, end in zip(fields[::3], fields[1::3], fields[2::3], strict=True)
    )


@dataclass(slots=True)
class HeldTurn:
    """What a shared child has left, with what it has held for its own children."""

    call: str = ""
    """The call of the parent that has created the child."""
    end: int = 0
    """The position behind the items of this turn."""
    messages: list[Any] = field(default_factory=list)
    artifacts: list[RunArtifact] = field(default_factory=list)
    changes: dict[str, str | None] = field(default_factory=dict)
    """The changed keys of the session state, with their values as JSON. None: the key is removed."""


def state_after(turns: Iterable[HeldTurn], texts: Mapping[str, str]) -> dict[str, str]:
    """A session state (JSON by key) after these turns."""
    state: dict[str, str | None] = dict(texts)
    for turn in turns:
        state |= turn.changes
    return {key: text for key, text in state.items() if text is not None}


class TakenTurns(NamedTuple):
    """The turns that a run has got with a recorded delegation, and before it.

    `end` is the position behind the last one, `call` the call of the run that has created its child.
    """

    end: int = 0
    call: str = ""


def taken_turns(record: str) -> TakenTurns:
    """Those that a record (JSON) says the run has got. Raises the errors of parsing."""
    if f'"{HELD}"' not in record:
        return TakenTurns()
    fields = loads(record)
    value = fields["outcome"].get("ok") if fields["kind"] == "delegate" else None
    if not isinstance(value, Mapping) or HELD not in value:
        return TakenTurns()
    [held] = ranges_of(value[HELD])
    return TakenTurns(held.end, str(fields["call"]))


def turns_expired(lender: str) -> HeldTurnsExpired:
    """The error for a run that needs turns which the run `lender` has held."""
    return HeldTurnsExpired(
        f"the run needs the turns that shared children have left with the run {lender!r}, and they are not "
        "stored any more",
        hint="they expire OPENAGENTS_RUN_TTL_S after the end of that run; submit the task as a new run",
    )


async def load_held_turns(store: Reader, held: HeldRange) -> list[HeldTurn]:
    """The turns in this range. Raises `RecordUnreadable`, or `HeldTurnsExpired` if they are not stored any
    more."""
    items = await _load_items(store, held)
    with translate_parse_errors(WRITTEN, run_id=held.run_id):
        return _turns_of(items, held.begin, store.codec)


def _turns_of(items: Sequence[str], position: int, codec: PayloadCodec) -> list[HeldTurn]:
    turns: list[HeldTurn] = []
    turn, key = HeldTurn(), ""
    for item in items:
        position += 1
        text = item[1:]
        match _HeldKind(item[:1]):
            case _HeldKind.MESSAGE:
                turn.messages.append(loads(codec.decode(text)))
            case _HeldKind.ARTIFACT:
                turn.artifacts.append(RunArtifact.model_validate_json(codec.decode(text)))
            case _HeldKind.STATE_KEY:
                key = text
            case _HeldKind.STATE_VALUE:
                turn.changes[key] = codec.decode(text)
            case _HeldKind.STATE_REMOVED:
                turn.changes[text] = None
            case _HeldKind.END_OF_TURN:
                turn.call, turn.end = text, position
                turns.append(turn)
                turn = HeldTurn()
    return turns


async def _load_items(store: Reader, held: HeldRange) -> list[str]:
    """The items in this range, read in pages."""
    key = store.keys("held", held.run_id)
    items: list[str] = []
    size = PageSize(first=FIRST_PAGE_ITEMS, max_count=MAX_PAGE_ITEMS)
    while (at := held.begin + len(items)) < held.end:
        to = min(at + size.count, held.end)
        page: list[str] = await store.ask(partial(_page, key, at, to))
        if not page:
            raise turns_expired(held.run_id)
        size.learn(len(page), sum(map(len, page)))
        items += page
    return items


def _page(key: str, at: int, to: int, client: Any) -> Any:
    return client.lrange(key, at, to - 1)
