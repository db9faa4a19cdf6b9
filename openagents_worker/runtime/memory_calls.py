"""Memory calls: the only place that calls the memory of a run, before the pattern and after it.

The calls of a memory with its own store are recorded, so that they are made once. A memory that keeps its
data in the session state is called again in every attempt, with the same result. Model and tool calls of a
memory are recorded like those of the pattern.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from openagents_worker.errors import OpenAgentsError, PatternError
from openagents_worker.llm.base import CallInfo
from openagents_worker.memory.base import NOTED_BY, PENDING_WRITES, MemoryPlugin
from openagents_worker.memory.chain import ChainMember, members_of
from openagents_worker.models import ErrorDetails
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.state import Overlay, apply_changes
from openagents_worker.runtime.user_code import (
    class_path,
    coded,
    described_in_log,
    executing,
    user_error_of,
)
from openagents_worker.telemetry.logs import get_logger

__all__ = ["MemoryCalls"]

log = get_logger(__name__)

LAST_OUTPUT = "_runtime_last_output"
"""The state key with the output of the run, where plugins of the original SDK expect it."""


class MemoryCalls:
    """The memory of one attempt, or the memories of a chain."""

    def __init__(
        self,
        memory: Any,
        *,
        context: AttemptContext,
        recorder: Recorder,
        emit: Callable[..., None],
        on_error: str,
    ) -> None:
        """`emit(name, **payload)` emits an event of the run."""
        self._context = context
        self._members = [
            MemberCalls(member, context=context, recorder=recorder, emit=emit)
            for member in members_of(memory, on_error == "fail")
        ]
        self.is_external = any(member.is_external for member in self._members)

    async def inject(self, *, is_first: bool) -> None:
        """Let the memories fill `memory_view`. `is_first`: no earlier attempt has emitted the events."""
        for member in self._members:
            await member.inject(is_first=is_first)

    async def write_back(self, output: Any) -> None:
        """Call `writeback` and then `compact` of the memories for a run with this output, the last first."""
        state = self._context.run_state
        state[LAST_OUTPUT] = output
        try:
            await self._write_back_all(state)
            for member in reversed(self._members):
                await member.call("compact")
        finally:
            state.pop(LAST_OUTPUT, None)

    async def _write_back_all(self, state: dict[str, Any]) -> None:
        """Let each memory store the turn. What the run notes for its memory is there for each of them.

        Notes that no memory has taken are left to the next run of the session.
        """
        notes = state.get(PENDING_WRITES)
        are_taken = False
        for member in reversed(self._members):
            if notes:
                state[PENDING_WRITES] = copy.deepcopy(notes)
            await member.call("writeback")
            are_taken |= not state.get(PENDING_WRITES)
        if notes and are_taken:
            state.pop(PENDING_WRITES, None)
        elif isinstance(notes, list):
            state[PENDING_WRITES] = [_left_by(self._context.run_id, note) for note in notes]


class MemberCalls:
    """The calls of one memory."""

    def __init__(
        self,
        member: ChainMember,
        *,
        context: AttemptContext,
        recorder: Recorder,
        emit: Callable[..., None],
    ) -> None:
        self._memory = member.memory
        self._path = class_path(member.memory)
        self._context = context
        self._recorder = recorder
        self._emit = emit
        self._fails_run = member.fails_run
        self.is_external = bool(getattr(member.memory, "external", True))

    async def inject(self, *, is_first: bool) -> None:
        """Let the memory fill `memory_view`."""
        if self.is_external:
            await self._record_call("inject", self._make_inject_call)
            return
        emit = self._emit if is_first else _emit_nothing
        try:
            with self._calling("inject", emit), _Overlaid(self._context) as overlay:
                await self._memory.inject(self._context)
                changes = overlay.changes()
        except Exception:
            if self._fails_run:
                raise
            return
        self._emit_injected(emit, len(self._context.memory_view))
        apply_changes(self._context.run_state, changes)

    async def call(self, step: str) -> None:
        """Call `writeback` or `compact`, if the memory has it."""
        if not self._implements(step):
            return
        if self.is_external:
            await self._record_call(step, partial(self._make_step_call, step))
        else:
            await self._run_step_unrecorded(step)

    async def _record_call(self, step: str, make: Callable[[CallInfo], Any]) -> None:
        """Make a recorded call of the memory. Its errors are ignored with `on_error: continue`."""
        try:
            view = await self._recorder.call("memory", step, "", make)
        except OpenAgentsError:
            if self._fails_run or self._recorder.verdict is not None:
                raise
            return
        if view is not None:
            self._context.memory_view = {**self._context.memory_view, **view}

    async def _make_inject_call(self, _: CallInfo) -> Outcome:
        """The view of this memory is recorded, without what others have added to it before."""
        before = self._context.memory_view
        try:
            with self._calling("inject", self._emit), _Overlaid(self._context) as overlay:
                self._context.memory_view = copy.deepcopy(before)
                await self._memory.inject(self._context)
                view = self._context.memory_view
                own = {key: value for key, value in view.items() if key not in before or value != before[key]}
                changes = overlay.changes()
        except Exception as error:  # noqa: BLE001 - any error is the outcome of this call
            return Outcome(error=coded(error, PatternError))
        finally:
            self._context.memory_view = before
        succeeded = partial(self._emit_injected, self._emit, len(view))
        return Outcome(value=own, state=changes, report=partial(self._report, "inject", succeeded))

    def _implements(self, step: str) -> bool:
        """Whether the memory overrides this method of `MemoryPlugin`."""
        own = getattr(type(self._memory), step, None)
        return hasattr(self._memory, step) and own is not getattr(MemoryPlugin, step)

    async def _make_step_call(self, step: str, _: CallInfo) -> Outcome:
        try:
            with self._calling(step, self._emit), _Overlaid(self._context) as overlay:
                await getattr(self._memory, step)(self._context)
                changes = overlay.changes()
        except Exception as error:  # noqa: BLE001 - any error is the outcome of this call
            return Outcome(error=coded(error, PatternError))
        return Outcome(state=changes, report=partial(self._report, step, partial(self._emit_succeeded, step)))

    async def _run_step_unrecorded(self, step: str) -> None:
        try:
            with self._calling(step, self._emit):
                await getattr(self._memory, step)(self._context)
        except Exception:
            if self._fails_run:
                raise
            return
        self._emit_succeeded(step)

    # --- events ------------------------------------------------------------------------------------------

    @contextmanager
    def _calling(self, step: str, emit: Callable[..., None]) -> Iterator[None]:
        """A block of code of the memory. Its errors become coded errors, and are reported."""
        emit(f"memory.{step}.started")
        try:
            with executing("memory", self._path, wrap=PatternError, prefix=f"memory {step}: "):
                yield
        except Exception as error:
            self._report_failure(step, error, emit)
            raise

    def _report(self, step: str, succeeded: Callable[[], None], not_stored: OpenAgentsError | None) -> None:
        """Report the end of a recorded call: it has failed if what the memory gives cannot be stored."""
        if not_stored is None:
            succeeded()
        else:
            self._report_failure(step, not_stored, self._emit)

    def _report_failure(self, step: str, error: Exception, emit: Callable[..., None]) -> None:
        emit(f"memory.{step}_failed", error=str(error), error_details=_details(error))
        self._log_failure(step, error)

    def _emit_injected(self, emit: Callable[..., None], view_size: int) -> None:
        emit("memory.injected")
        emit("memory.inject.completed", view_size=view_size)

    def _emit_succeeded(self, step: str) -> None:
        self._emit(f"memory.{step}_succeeded")
        self._emit(f"memory.{step}.completed")

    def _log_failure(self, step: str, error: Exception) -> None:
        if isinstance(error, OpenAgentsError):  # anything else is a signal of the runtime
            log.warning(
                f"memory.{step}_failed",
                run_id=self._context.run_id,
                agent_id=self._context.agent_id,
                on_error="fail" if self._fails_run else "continue",
                **described_in_log(error),
                user_error=user_error_of(error),
            )


class _Overlaid:
    """A block that collects changes to the state of the run. They are applied when its call is recorded."""

    __slots__ = ("_context", "_state")

    def __init__(self, context: AttemptContext) -> None:
        self._context = context
        self._state = context.run_state

    def __enter__(self) -> Overlay:
        overlay = Overlay(self._state)
        self._context.run_state = overlay  # type: ignore[assignment]  # a mapping, as plugins expect
        return overlay

    def __exit__(self, *_: object) -> None:
        self._context.run_state = self._state


def _left_by(run_id: str, note: Any) -> Any:
    """A note as the next run of the session gets it."""
    return {NOTED_BY: run_id, **note} if isinstance(note, dict) else note


def _emit_nothing(_: str, **__: Any) -> None:
    """An earlier attempt has emitted this event."""


def _details(error: BaseException) -> dict[str, Any]:
    return ErrorDetails.from_exception(error).model_dump(exclude_none=True)
