"""Retry counts: the only place that defines under which names the run record counts the retries of calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from openagents_worker.runtime.call_ids import name_of
from openagents_worker.runtime.rules import MODEL_KINDS, CallQuery

__all__ = ["RetryCounts"]

MAX_REQUESTS_DIGITS = 10  # of a stored count; a longer one was not written by this library


class RetryCounts:
    """How often the calls of a run were retried later, in runs that are replayed by content."""

    def __init__(self, tries: Mapping[str, int], ended: Collection[str]) -> None:
        """`ended`: the ids of the calls that have a final record."""
        self._tries = dict(tries)
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in self._tries:
            call, kind, node, _ = _parse_name(name)
            if kind and call not in ended:
                self._names[_key_of(kind, node, name_of(call))].append(name)
                self._names[call].append(name)

    @staticmethod
    def name(query: CallQuery, call_id: str, requests: int) -> str:
        """The name under which a retry of this call is counted, if its try sent so many requests."""
        name = f"{call_id}\n{query.kind}\n{query.branch}"
        return name if requests == 1 else f"{name}\n{requests}"

    def failed_tries(self, query: CallQuery, call_id: str) -> int:
        """How often this call was retried later. A model call with a new prompt inherits the count."""
        if not self._names:
            return 0
        return sum(self._tries[name] for name in self._names_of(query, call_id))

    def requests_sent(self, query: CallQuery, call_id: str) -> int:
        if not self._names:
            return 0
        names = self._names_of(query, call_id)
        return sum(self._tries[name] * _parse_name(name)[3] for name in names)

    def _names_of(self, query: CallQuery, call_id: str) -> Sequence[str]:
        """The counts of a call; for a model call with a new prompt, those of its predecessor."""
        names = self._names.get(call_id)
        if names is None and query.kind in MODEL_KINDS:
            names = self._names.get(_key_of(query.kind, query.branch, query.name))
        return names or ()


def _key_of(kind: str, node: str, name: str) -> str:
    return f"{kind}\n{node}\n{name}"


def _parse_name(name: str) -> tuple[str, str, str, int]:
    """Split the name of a count into call id, kind, node, and the requests of each of these tries."""
    call, _, rest = name.partition("\n")
    kind, _, rest = rest.partition("\n")
    node, _, requests = rest.partition("\n")
    is_count = requests.isdecimal() and len(requests) < MAX_REQUESTS_DIGITS
    return call, kind, node, int(requests) if is_count else 1
