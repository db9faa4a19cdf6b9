"""States in lists: the only place that finds which runs of a list may match a filter by state or error code.

No index covers these filters. Only a few fields of each run are read here, not its request and its result.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from openagents_worker.errors import RedisNoPermission
from openagents_worker.models import RunState
from openagents_worker.store.index_pages import for_each_id
from openagents_worker.store.keys import Keys
from openagents_worker.store.plan import Plan
from openagents_worker.store.redis_errors import default_if_wrong_type, is_wrong_type
from openagents_worker.store.scripts import UNKNOWN_CODE, RunsInStates, in_states

__all__ = ["WITH_CODE", "CompareBy", "runs_in_states", "stored_end_code"]

COMPARED_FIELDS = ("state", "life", "end_code", "last_error")
WITH_CODE = frozenset({RunState.FAILED, RunState.CANCELLED, RunState.RETRYING})
"""The states of runs that have an error code (`RunRecord.reason_code`)."""


class CompareBy(StrEnum):
    """How the runs of a list are compared with a filter by state or by error code."""

    STATES = "states"
    """A few fields of each run are read, then the records of those that match."""
    SCRIPT = "script"
    """The same in few commands: a script compares a thousand runs. It is STATES for a user who may not run
    scripts."""
    RECORDS = "records"
    """All records are read, so that each unreadable one is found."""


def runs_in_states(
    keys: Keys, ids: Sequence[str], states: Sequence[RunState], code: str | None, compare_by: CompareBy
) -> Plan[list[str]]:
    """The ids of the runs in these states whose error code matches the glob `code`; None: any code.

    A run whose record does not show its code is among them, and one whose record has a wrong type.
    """
    if not states:
        return []
    pairs: list[tuple[str, str]] | None = None
    if compare_by is CompareBy.SCRIPT:
        with suppress(RedisNoPermission):
            found: RunsInStates = yield in_states(ids=ids, states=states, with_codes=code is not None)
            pairs = list(zip(found.ids, found.codes or (UNKNOWN_CODE,) * len(found.ids), strict=True))
    if pairs is None:
        rows = yield from for_each_id(ids, lambda r, id_: r.hmget(keys("run", id_), COMPARED_FIELDS))
        codes = [_code_in_states(values, states) for (values,) in rows]
        pairs = [(id_, own) for id_, own in zip(ids, codes, strict=True) if own is not None]
    return [id_ for id_, own in pairs if code is None or own == UNKNOWN_CODE or fnmatchcase(own, code)]


def _code_in_states(values: Any, states: Sequence[RunState]) -> str | None:
    """The error code of a run from `COMPARED_FIELDS`; None if it is in none of the states.

    UNKNOWN_CODE if only its result contains the code. The script `in_states` does the same.
    """
    if is_wrong_type(values):
        return UNKNOWN_CODE
    state, life, ended, last_error = default_if_wrong_type(values, (None,) * len(COMPARED_FIELDS))
    if state not in states:
        return None
    if state == RunState.RETRYING:
        return last_error or ""
    return stored_end_code(ended, life) or UNKNOWN_CODE


def stored_end_code(field: str | None, life: str | None) -> str | None:
    """The code in the field `end_code`, if it is that of this life; '' or None without one."""
    ended_life, _, code = (field or "").partition(" ")
    return code if ended_life == (life or "") else None
