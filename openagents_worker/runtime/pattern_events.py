"""Events of the pattern: the only place that decides which of them replay emits again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from openagents_worker.runtime.call_ids import content_of
from openagents_worker.runtime.call_outcome import Event
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.rules import CallQuery, Rules
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.telemetry.logs import get_logger

__all__ = ["PatternEvents"]

log = get_logger(__name__)


class PatternEvents:
    """Emits the events of a pattern. The events of a branch are held back while the branch is replayed.

    An event before a replayed call was emitted by an earlier attempt: it is dropped.
    """

    def __init__(self, rules: Rules, writer: RunWriter) -> None:
        self._rules = rules
        self._writer = writer
        self._held: defaultdict[str, list[Event]] = defaultdict(list)

    def emit_or_hold(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event, or hold it back. Raises `StepTooLarge`, in each attempt."""
        if self._rules.is_replay_over or self._rules.is_inside_a_call():
            self._emit(name, payload)
        else:
            self._writer.check_event(name, payload)
            self._held[self._rules.branch()].append((name, payload))

    def emit_changed_prompt(self, record: Record, query: CallQuery) -> None:
        """Emit an event if the prompt of the call differs from the recorded one."""
        recorded = record.digest or content_of(record.call)
        if recorded != query.content:
            self._writer.emit(
                "replay.prompt_changed",
                {
                    "call_id": record.call,
                    "model": record.name,
                    "recorded_digest": recorded,
                    "digest": query.content,
                },
            )

    def drop(self, branch: str) -> None:
        """Drop the held events of a branch: a record answers the call that follows them."""
        self._held.pop(branch, None)

    def release(self, branch: str) -> None:
        """Emit the held events of a branch: it has left its recorded part."""
        for event in self._held.pop(branch, ()):
            self._emit(*event)

    def release_all_if_replayed(self) -> None:
        """Emit all held events if every record was used."""
        if self._held and self._rules.is_replay_over:
            for branch in list(self._held):
                self.release(branch)

    def _emit(self, name: str, payload: Mapping[str, Any]) -> None:
        self._writer.emit_user_event(name, payload)
        if name == "tool.failed":  # for example, the model called a tool that does not exist
            fields: dict[str, Any] = {
                key: payload[key] for key in ("tool_id", "code", "message") if key in payload
            }
            log.warning("tool.failed", run_id=self._writer.run_id, **fields)
