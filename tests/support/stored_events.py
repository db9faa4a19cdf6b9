"""Stored events. The only place where tests decode the entries of an event stream without a watcher."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from openagents_worker.models import RunState
from openagents_worker.store.event_cursor import Entry, RunHead, stored_event


def shown(
    entries: Iterable[Entry], run_id: str = "r1", *, agent_id: str = "a1", session_id: str = "s1"
) -> list[dict[str, Any]]:
    """The events of the entries of a stream, as JSON objects."""
    head = RunHead(run_id, RunState.RUNNING, 0, 1, agent_id, session_id)
    return [json.loads(stored_event(head, entry).to_json()) for entry in entries]
