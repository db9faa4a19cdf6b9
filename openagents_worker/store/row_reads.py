"""Row reads: the only place that reads the same keys of many ids, with many commands or with one.

A page in Flower is read again every few seconds by everybody who has it open. So it may send only a few
commands, however much there is to show: a script reads the keys. The role `watcher` may not run scripts. For
its users, and for the clients that they may use, each key is read with a command of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from openagents_worker.errors import RedisNoPermission
from openagents_worker.store.index_pages import for_each_id
from openagents_worker.store.plan import Plan
from openagents_worker.store.scripts import read_rows

__all__ = ["ReadBy", "RowRead", "read_each"]

IDS_PER_SCRIPT = 1000  # Redis needs a millisecond


class ReadBy(StrEnum):
    """How the rows of a list are read."""

    COMMANDS = "commands"
    """A command for each key, all in one round trip."""
    SCRIPT = "script"
    """One command for a thousand ids: for a page. A user who may not run scripts is served by commands."""


@dataclass(frozen=True, slots=True)
class RowRead:
    """What is read of each id: a kind of `store/lua/read_rows.lua`, and the same as commands.

    A command gets the redis-py client (or a pipeline) and the id.
    """

    kind: str
    commands: tuple[Callable[[Any, str], object], ...]
    words: tuple[str, ...] = ()


def read_each(read: RowRead, ids: Sequence[str], read_by: ReadBy) -> Plan[list[Sequence[Any]]]:
    """A plan that returns a row of answers for each id. An answer may be an exception."""
    rows: list[Sequence[Any]] = []
    if read_by is ReadBy.SCRIPT:
        try:
            for some in _in_turn(ids, IDS_PER_SCRIPT):
                rows += yield read_rows(kind=read.kind, ids=some, words=read.words)
            return rows
        except RedisNoPermission:
            rows = []
    return [*(yield from for_each_id(ids, *read.commands))] if ids else []


def _in_turn(ids: Sequence[str], count: int) -> list[Sequence[str]]:
    """The ids, at most so many at a time.

    >>> _in_turn("abcde", 2)
    ['ab', 'cd', 'e']
    """
    return [ids[at : at + count] for at in range(0, len(ids), count)]
