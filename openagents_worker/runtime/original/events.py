"""Events of plugins of the original SDK: the only place that decides which of them the run has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from openagents_worker.errors import PatternError, text_of
from openagents_worker.runtime.recorder import Recorder

__all__ = ["OriginalEventBus"]

OF_RUNTIME = frozenset(
    {
        "llm.called",
        "llm.succeeded",
        "llm.failed",
        "usage.updated",
        "budget.cost_skipped",
        "tool.called",
        "tool.succeeded",
        "tool.failed",
        "tool.retry_requested",
    }
)
"""Events that the runtime emits for each recorded call. The package's patterns emit them as well."""

IDS = ("agent_id", "session_id", "run_id")


class OriginalEventBus:
    """`context.event_bus`, for plugins written for the original SDK. It only emits events of the run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    async def emit(self, event_name: str, **payload: Any) -> None:
        """Emit an event of the run, unless the runtime emits this event itself.

        The ids of the run are left out, because every event has them. Values that are not JSON become text.
        """
        if event_name in OF_RUNTIME:
            return
        if event_name == "pattern.step_finished":
            payload = {**payload, "action": _action_name(payload.get("action"))}
        await self._recorder.emit(event_name, _plain(payload))

    def subscribe(self, *_: Any, **__: Any) -> None:
        """Raises `PatternError`: a handler would miss the events of other attempts and other processes."""
        raise PatternError(
            "a plugin cannot subscribe to events of its run",
            hint="watch the run from outside: RunHandle.events(), or the exporters of the worker",
        )


def _action_name(action: Any) -> Any:
    """What a step has done, as a name. The package's patterns put the whole answer there, or leave it out."""
    name = action.get("type") if isinstance(action, Mapping) else action
    return "continue" if name is None else name


def _plain(payload: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in payload.items() if name not in IDS}
    plain: dict[str, Any] = to_jsonable_python(fields, fallback=text_of, inf_nan_mode="constants")
    return plain
