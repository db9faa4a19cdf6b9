"""A run's memory, as the runtime asks it: before the pattern, and after it.

A memory with a store of its own is asked through the recorder, once: what it gave is in the journal. One
that lives in the session's state is asked again by every attempt and gives the same. A memory's own calls of
models and tools are recorded like those of the pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from openagents_worker.errors import OpenAgentsError, PatternError
from openagents_worker.llm.base import CallInfo
from openagents_worker.memory.base import MemoryPlugin
from openagents_worker.models import ErrorDetails
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.state import Overlay, apply_changes
from openagents_worker.runtime.user_code import (
    class_path,
    coded,
    described_in_log,
    executing,
    user_code,
    user_error_of,
)
from openagents_worker.telemetry.logs import get_logger

__all__ = ["MemoryCalls"]

log = get_logger(__name__)

LAST_OUTPUT = "_runtime_last_output"
"""Where a memory finds the run's answer in the state, as plugins of the original SDK expect it."""


class MemoryCalls:
    """The memory of one attempt. `note` takes an event of the run: its name, and its payload as keywords."""

    def __init__(
        self,
        memory: Any,
        *,
        context: RunContext,
        recorder: Recorder,
        note: Callable[..., None],
        on_error: str,
    ) -> None:
        self._memory = memory
        self._context = context
        self._recorder = recorder
        self._note = note
        self._fails_run = on_error == "fail"
        self.is_external = bool(getattr(memory, "external", True))

    async def inject(self, *, is_first: bool) -> None:
        """Fill the memory view. `is_first`: no attempt before this one has told of it."""
        if self.is_external:
            await self._recorded("inject", self._inject_recorded)
            return
        try:
            changes = await self._fill_view(self._note if is_first else _silent)
        except Exception:
            if self._fails_run:
                raise
            return
        apply_changes(self._context.state, changes)

    async def _fill_view(self, note: Callable[..., None]) -> dict[str, Any]:
        """Let the memory fill the view; what it changed in the state."""
        note("memory.inject.started")
        try:
            with (
                self._overlay() as overlay,
                executing("memory", class_path(self._memory)),
                user_code(PatternError, prefix="memory inject: "),
            ):
                await self._memory.inject(self._context)
        except Exception as error:
            note("memory.inject_failed", error=str(error), error_details=_details(error))
            self._log_failure("inject", error)
            raise
        note("memory.injected")
        note("memory.inject.completed", view_size=len(self._context.memory_view))
        return overlay.changes()

    async def remember(self, output: Any) -> None:
        """Let the memory keep what it wants of the run, whose answer is `output`."""
        self._context.state[LAST_OUTPUT] = output
        try:
            for verb in ("writeback", "compact"):
                if not self._does(verb):
                    continue
                if self.is_external:
                    await self._recorded(verb, partial(self._step_recorded, verb))
                else:
                    await self._step_of_state(verb)
        finally:
            self._context.state.pop(LAST_OUTPUT, None)

    async def _recorded(self, verb: str, make: Callable[[CallInfo], Any]) -> None:
        try:
            view = await self._recorder.call("memory", verb, "", make)
        except OpenAgentsError:
            if self._fails_run or self._recorder.verdict is not None:
                raise
            return
        if view is not None:
            self._context.memory_view = view

    async def _inject_recorded(self, _: CallInfo) -> Outcome:
        try:
            changes = await self._fill_view(self._note)
        except Exception as error:  # noqa: BLE001  # whatever it raises is the outcome of this call
            return Outcome(error=coded(error, PatternError))
        return Outcome(value=dict(self._context.memory_view), state=changes)

    def _does(self, verb: str) -> bool:
        """Whether the memory has a step of that name that does something."""
        own = getattr(type(self._memory), verb, None)
        return hasattr(self._memory, verb) and own is not getattr(MemoryPlugin, verb)

    async def _step_recorded(self, verb: str, _: CallInfo) -> Outcome:
        try:
            with self._overlay() as overlay:
                await self._step(verb)
        except Exception as error:  # noqa: BLE001  # whatever it raises is the outcome of this call
            return Outcome(error=coded(error, PatternError))
        return Outcome(state=overlay.changes())

    async def _step_of_state(self, verb: str) -> None:
        try:
            await self._step(verb)
        except Exception:
            if self._fails_run:
                raise

    async def _step(self, verb: str) -> None:
        self._note(f"memory.{verb}.started")
        try:
            with (
                executing("memory", class_path(self._memory)),
                user_code(PatternError, prefix=f"memory {verb}: "),
            ):
                await getattr(self._memory, verb)(self._context)
        except Exception as error:
            self._note(f"memory.{verb}_failed", error=str(error), error_details=_details(error))
            self._log_failure(verb, error)
            raise
        self._note(f"memory.{verb}_succeeded")
        self._note(f"memory.{verb}.completed")

    def _log_failure(self, verb: str, error: Exception) -> None:
        if isinstance(error, OpenAgentsError):  # else it is a signal of the runtime
            log.warning(
                f"memory.{verb}_failed",
                run_id=self._context.run_id,
                agent_id=self._context.agent_id,
                on_error="fail" if self._fails_run else "continue",
                **described_in_log(error),
                user_error=user_error_of(error),
            )

    @contextmanager
    def _overlay(self) -> Iterator[Overlay]:
        """The run's state, with changes kept to itself: they count when the call is recorded."""
        before, overlay = self._context.state, Overlay(self._context.state)
        self._context.state = overlay  # type: ignore[assignment]  # a mapping, as plugins expect
        try:
            yield overlay
        finally:
            self._context.state = before


def _silent(_: str, **__: Any) -> None:
    """An attempt before this one has said it."""


def _details(error: BaseException) -> dict[str, Any]:
    return ErrorDetails.from_exception(error).model_dump(exclude_none=True)
