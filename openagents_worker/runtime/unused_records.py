"""Unused records: what earlier attempts have recorded and this attempt has not asked for yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from openagents_worker.runtime.call_ids import content_of, name_of
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.replay_loading import LoadedRecords
from openagents_worker.runtime.rules import REMEMBER, OpenCall

__all__ = ["UnusedRecords", "described"]


class UnusedRecords:
    """The records that can still answer a call, and the open calls that can still be continued."""

    def __init__(self, loaded: LoadedRecords) -> None:
        self._records: dict[str, Record] = {}
        self._by_key: dict[tuple[str, ...], dict[str, Record]] = defaultdict(dict)
        self._open: dict[str, dict[str, OpenCall]] = defaultdict(dict)
        self._inside = loaded.inside_call
        self._cancelled_after_record = loaded.cancelled_after_record
        self.is_empty = True
        for call in loaded.open_calls:
            self._add_open(call)
        for record in loaded.replayed:
            self._add(record)
        self._check_if_empty()

    def _check_if_empty(self) -> None:
        self.is_empty = not (self._records or self._open)

    # --- records -----------------------------------------------------------------------------------------

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._records

    def _add(self, record: Record) -> None:
        self._records[record.call] = record
        for key in _keys(record):
            self._by_key[key][record.call] = record

    def remove(self, record: Record) -> None:
        """A record answers a call now."""
        del self._records[record.call]
        for key in _keys(record):
            del self._by_key[key][record.call]
            if not self._by_key[key]:
                del self._by_key[key]
        self._check_if_empty()

    def first(self, key: tuple[str, ...]) -> Record | None:
        """The first record under a key; cancelled ones come last."""
        found = self._by_key.get(key)
        if not found:
            return None
        return next((each for each in found.values() if not each.is_cancelled), next(iter(found.values())))

    def first_of_node(self, level: str, digest: str, node: str) -> Record | None:
        """The first record with this digest in a node."""
        return next(iter(self._by_key.get((level, digest, node), _NO_RECORDS).values()), None)

    def was_cancelled(self, record: Record) -> bool:
        """Whether the program saw a cancellation of this call, with or without a recorded outcome."""
        return record.is_cancelled or record.call in self._cancelled_after_record

    @property
    def are_only_cancelled(self) -> bool:
        """Whether every record was used, but for those of cancelled calls."""
        return all(self.was_cancelled(record) for record in self._records.values())

    def take_inside(self, record: Record) -> Sequence[Record]:
        """The records of calls made inside this one. They are replayed together with it."""
        return self._inside.pop(record.call, ())

    def reopen_inside(self, record: Record) -> None:
        """A cancelled call is made again. Calls recorded inside it now answer calls inside it."""
        depth = len(record.outer) + 1
        for inner in self._inside.pop(record.call, ()):
            if not any(outer.id in self._inside for outer in inner.outer[depth:]):
                self._add(inner)
        self._check_if_empty()

    # --- open calls --------------------------------------------------------------------------------------

    def open_calls(self, content: str) -> Mapping[str, OpenCall]:
        """The open calls with this content, by id."""
        return self._open.get(content, _NO_CALLS)

    def open_call_of_node(self, content: str, node: str) -> OpenCall | None:
        """The open call with this content that this node began."""
        return next((call for call in self.open_calls(content).values() if call.node == node), None)

    def is_open(self, call_id: str) -> bool:
        return call_id in self.open_calls(content_of(call_id))

    def _add_open(self, call: OpenCall) -> None:
        self._open[content_of(call.id)].setdefault(call.id, call)

    def remove_open(self, call: OpenCall) -> None:
        """An open call is made now."""
        content = content_of(call.id)
        del self._open[content][call.id]
        if not self._open[content]:
            del self._open[content]
        self._check_if_empty()

    def _may_stay_unused(self, call_id: str) -> bool:
        """Whether the call failed in an earlier life. Then it and the calls inside it need not be made."""
        call = self.open_calls(content_of(call_id)).get(call_id) if call_id else None
        return call is not None and not call.is_begun

    # --- both --------------------------------------------------------------------------------------------

    def next_of_node(self, node: str, scope: str) -> Record | OpenCall | None:
        """The first record of this node and scope that was not cancelled, or its first open call."""
        records = self._by_key.get(("node", node, scope), {})
        record = next((each for each in records.values() if not each.is_cancelled), None)
        if record is not None:
            return record
        for calls in self._open.values():
            for call in calls.values():
                if call.is_begun and call.node == node and call.scope == scope:
                    return call
        return None

    def next_position(self, node: str) -> int | None:
        """The position of the first record of a node or of the nodes below it that was not cancelled."""
        below = f"{node}/"
        for record in self._records.values():
            if not record.is_cancelled and (record.node == node or record.node.startswith(below)):
                return record.position
        return None

    def described(self, part: str) -> list[str]:
        """The calls, in the parts up to this one, that the program has not made: one text each."""
        unused = [
            described(record)
            for record in self._records.values()
            if not self.was_cancelled(record)
            and _belongs_to(record.node, part)
            and not any(self._may_stay_unused(outer.id) for outer in record.outer)
        ]
        opened = [
            f"{call.kind} {name_of(call.id)} ({call.id})"
            for calls in self._open.values()
            for call in calls.values()
            if call.is_begun and _belongs_to(call.node, part) and not self._may_stay_unused(call.scope)
        ]
        return unused + opened


_NO_RECORDS: Mapping[str, Record] = {}
_NO_CALLS: Mapping[str, OpenCall] = {}


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    """The keys under which a record can be found."""
    content = content_of(record.call)
    yield ("content", content)
    yield ("content", content, record.node)
    if record.core:
        yield ("core", record.core)
        yield ("core", record.core, record.node)
    yield ("node", record.node, record.scope)


def _belongs_to(node: str, part: str) -> bool:
    """Whether a node belongs to `part` or to an earlier part of the run."""
    return part == REMEMBER or not (node == REMEMBER or node.startswith(f"{REMEMBER}/"))


def described(call: Record | OpenCall) -> str:
    if isinstance(call, Record):
        return f"{call.kind} {call.name} ({call.call})"
    return f"{call.kind} {name_of(call.id)} ({call.id}), which was begun"
