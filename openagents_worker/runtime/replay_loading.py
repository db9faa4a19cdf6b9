"""Loading for replay: the only place that sorts the records of earlier attempts.

A record is replayed, or replayed together with the call in which it was made, or its call is made again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.rules import OpenCall

__all__ = ["LoadedRecords", "sort_records"]


@quick_init
@dataclass(frozen=True, slots=True)
class LoadedRecords:
    """The sorted records of a run."""

    replayed: list[Record]
    inside_call: defaultdict[str, list[Record]]
    """The records made inside each replayed call, by its id."""
    open_calls: list[OpenCall]
    cancelled_after_record: set[str]
    """The ids of calls that the program cancelled although their outcome is recorded."""
    used_ids: list[str]
    ended: Collection[str]
    """The ids of the calls that are not made again."""


def sort_records(records: Iterable[Record], life: int, begun: Iterable[OpenCall] = ()) -> LoadedRecords:
    """Sort the records of earlier attempts: to be replayed, inside other calls, or to be made again.

    `begun` are the calls of which facts are stored.
    """
    stored, cancelled_after_record = _last_of_each_call(records)
    reopened = _reopened_calls(stored.values(), life)
    ended = stored.keys() - reopened
    loaded = LoadedRecords([], defaultdict(list), [], cancelled_after_record, [], ended)
    for call, record in stored.items():
        loaded.used_ids.append(call)
        for outer in _unfinished_outer_calls(record, stored):
            loaded.used_ids.append(outer.id)
            loaded.open_calls.append(outer)
        enclosing = [outer.id for outer in record.outer if outer.id in ended]
        if call in reopened:
            loaded.open_calls.append(OpenCall(call, record.kind, record.node, record.scope, is_begun=False))
        elif enclosing:  # replayed together with the call in which it was made
            for outer_id in enclosing:
                loaded.inside_call[outer_id].append(record)
        else:
            loaded.replayed.append(record)
    for open_call in begun:
        if open_call.id not in stored and open_call.scope not in ended:
            loaded.used_ids.append(open_call.id)
            loaded.open_calls.append(open_call)
    return loaded


def _last_of_each_call(records: Iterable[Record]) -> tuple[dict[str, Record], set[str]]:
    """The last record of each call, and the ids of calls that were cancelled after their record."""
    stored: dict[str, Record] = {}
    cancelled_after_record: set[str] = set()
    for record in records:
        if record.call.endswith("!"):
            cancelled_after_record.add(record.call[:-1])
            continue
        if record.call in stored:  # a later record of a call replaces an earlier one
            del stored[record.call]
            cancelled_after_record.discard(record.call)
        stored[record.call] = record
    return stored, cancelled_after_record


def _unfinished_outer_calls(record: Record, stored: Mapping[str, Record]) -> Iterator[OpenCall]:
    """The enclosing calls without a record: they were in progress when their attempt ended."""
    scope = ""
    for outer in record.outer:
        if outer.id not in stored:
            yield OpenCall(outer.id, outer.kind, outer.node, scope)
        scope = outer.id


def _reopened_calls(records: Iterable[Record], life: int) -> set[str]:
    """The ids of the calls that ended an earlier life. They are made again in this life.

    These are errors and cancellations after which neither their node nor one of its parents recorded
    anything. If something followed, the program had handled the error, and it is replayed.
    """
    went_on: set[str] = set()
    reopened: set[str] = set()
    for record in reversed(list(records)):
        ended_badly = "error" in record.outcome or record.is_cancelled
        if (
            record.life < life
            and ended_badly
            and not any(path in went_on for path in _path_and_parents(record.node))
        ):
            reopened.add(record.call)
        else:
            went_on.add(record.node)
    return reopened


def _path_and_parents(path: str) -> Iterator[str]:
    yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path
