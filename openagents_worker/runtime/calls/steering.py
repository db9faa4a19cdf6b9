"""Recorded steering: the only place where a run takes the messages that were sent to it while it works."""

from __future__ import annotations

from typing import Any

from openagents_worker.llm.base import CallInfo
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.rules import STEER
from openagents_worker.store.facts import FactKind

__all__ = ["take_steering"]


async def take_steering(recorder: Recorder, *, new: bool = True) -> list[str]:
    """The messages that arrived since the last time, in their order; mostly none. Without `new`, only those
    that an earlier attempt has taken here.

    Only if there are some, this is a recorded call. Replay makes it where it was made before.
    """
    is_recorded_next = recorder.rules.next_kind()
    if is_recorded_next is None:
        if not new or not recorder.waits.facts.of(FactKind.STEER):
            return []
    elif is_recorded_next != STEER:
        return []

    async def make(_: CallInfo) -> Outcome:
        facts = recorder.waits.facts.of(FactKind.STEER)
        recorder.waits.facts.forget(fact.name for fact in facts)
        messages = [_message_in(fact.value(run_id=recorder.run_id)) for fact in facts]
        return Outcome(
            value=messages,
            events=[("run.steered", message) for message in messages],
            taken=[fact.name for fact in facts],
            is_accepted=True,
        )

    return [message["text"] for message in await recorder.call(STEER, STEER, "", make)]


def _message_in(value: Any) -> dict[str, str]:
    """The text of a message, and who sent it."""
    fields = value if isinstance(value, dict) else {}
    return {name: str(fields.get(name) or "") for name in ("text", "by")}
