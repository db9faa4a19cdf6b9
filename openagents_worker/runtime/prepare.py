"""Prepare: from a claimed run to a pattern that can start; recorded as checkpoint 0 for later attempts."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from openagents_worker.agents import AgentDefinition
from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.base import ContextAssemblerPlugin
from openagents_worker.errors import OpenAgentsError, PatternError
from openagents_worker.llm.base import CallInfo
from openagents_worker.llm.transcript import healed
from openagents_worker.models import ErrorDetails, RunBudget
from openagents_worker.runtime.assembly import AgentParts
from openagents_worker.runtime.calls import RecordedModel, RecordedTool
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.journal import PREPARE, Record
from openagents_worker.runtime.memory_calls import MemoryCalls
from openagents_worker.runtime.output import OutputType
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
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.formats import BY_PLACE, WRITTEN, translate_parse_errors
from openagents_worker.store.records import SessionStore
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import ToolPlugin

__all__ = ["Prepared", "Preparation", "Start"]

log = get_logger(__name__)

DEFAULT_TOOL_TIMEOUT_MS = 30_000  # the `safe` executor's default in the original


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run started in its session; kept as checkpoint 0, so that every attempt starts there again."""

    transcript_length: int
    artifact_count: int
    definition_hash: str
    memory_view: dict[str, Any] | None = None
    """What an external memory gave, in runs that are replayed by place; else that is a record of its own."""

    def to_record(self, format_: int) -> Record:
        value: dict[str, Any] = {
            "transcript_length": self.transcript_length,
            "artifact_count": self.artifact_count,
            "definition_hash": self.definition_hash,
        }
        return Record(PREPARE, "prepare", "", {"ok": value}, self.definition_hash, v=format_)

    @classmethod
    def of(cls, record: Record) -> Start:
        """Raises `RecordUnreadable`."""
        with translate_parse_errors(WRITTEN):
            return cls(**record.outcome["ok"])


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything an attempt thinks with."""

    pattern: Any
    context: RunContext
    parts: AgentParts
    memory: MemoryCalls
    output_type: OutputType | None = None


class SessionAtStart:
    """The session as this run sees it: what others appended since is not there."""

    def __init__(self, sessions: SessionStore, start: Start) -> None:
        self._sessions = sessions
        self._start = start

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        """Whole turns, oldest first; of the newest `last` entries, where given."""
        upto = self._start.transcript_length
        return healed(await self._sessions.load_messages(session_id, last=last, upto=upto))

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        return await self._sessions.list_artifacts(session_id, last=last, upto=self._start.artifact_count)

    async def count_messages(self, session_id: str) -> int:
        return self._start.transcript_length


class Preparation:
    """Leads one attempt from its claim to its prepared context. Whatever it asks of others is recorded."""

    def __init__(
        self,
        *,
        context: RunContext,
        parts: AgentParts,
        sessions: SessionStore,
        recorder: Recorder,
        ledger: RunWriter,
        budget: RunBudget,
        recorded: Record | None,
        start: Start,
    ) -> None:
        """`recorded` is the run's checkpoint 0, None in the first attempt that gets so far."""
        self._context = context
        self._parts = parts
        self._recorder = recorder
        self._ledger = ledger
        self._budget = budget
        self._recorded = recorded
        self._session = SessionAtStart(sessions, start)
        self._start = start
        self._memory = MemoryCalls(
            parts.memory,
            context=context,
            recorder=recorder,
            note=ledger.emit_run_event,
            on_error=parts.definition.memory.on_error,
        )

    async def run(self) -> Prepared:
        """In the order of the original: compact, assemble, bind, preflight, inject."""
        wanted = OutputType.of(self._context.run_request)
        self._bind()
        await self._choose_the_past()
        await self._preflight()
        self._note("context.created")
        await self._inject()
        self._limit_the_past()
        if wanted is not None:
            self._context.system_prompt_fragments.append(wanted.instruction)
        pattern = self._parts.new_pattern()
        with executing("pattern", class_path(pattern)):
            await _set_up(pattern, self._context)
        return Prepared(pattern, self._context, self._parts, self._memory, wanted)

    def _note(self, name: str, **payload: Any) -> None:
        if self._recorded is None:
            self._ledger.emit_run_event(name, **payload)

    @property
    def _was_prepared_by_place(self) -> bool:
        """Whether checkpoint 0 holds all that was prepared, as it did when runs were replayed by place."""
        return self._recorded is not None and self._recorded.v == BY_PLACE

    # --- context -----------------------------------------------------------------------------------------

    async def _choose_the_past(self) -> None:
        assembler = self._parts.assembler
        if not _is_shared(assembler):
            with suppress(AttributeError):  # one of its own may ask models and tools, recorded like all calls
                assembler.context = self._context
        given: dict[str, Any] = {
            "request": self._context.run_request,
            "session_state": self._context.state,
            "session_manager": self._session,
        }
        if _compacts(assembler) and not self._was_prepared_by_place:
            with suppress(OpenAgentsError):  # its last try has failed, too: the past stays as long as it is
                await self._recorder.call(
                    "context", "compact", "", partial(self._compact, assembler.compact, given)
                )
        self._note("context.assemble.started")
        started = time.monotonic()
        with executing("context", class_path(assembler)):
            assembled = await assembler.assemble(**given)
        self._context.transcript = list(assembled.transcript)
        self._context.session_artifacts = list(assembled.session_artifacts)
        self._context.assembly_metadata = dict(assembled.metadata)
        self._note(
            "context.assemble.completed",
            transcript_size=len(assembled.transcript),
            artifact_count=len(assembled.session_artifacts),
            duration_ms=round((time.monotonic() - started) * 1000),
        )

    async def _compact(
        self, compact: Callable[..., Awaitable[None]], given: dict[str, Any], _: CallInfo
    ) -> Outcome:
        self._ledger.emit_run_event("context.compact.started")
        started, overlay = time.monotonic(), Overlay(self._context.state)
        try:
            with (
                executing("context", class_path(self._parts.assembler)),
                user_code(PatternError, prefix="context compact: "),
            ):
                await compact(**{**given, "session_state": overlay})
        except Exception as error:  # noqa: BLE001  # a past that could not be shortened is still a past
            failed = coded(error, PatternError)
            self._log_failure("context.compact_failed", failed)
            self._ledger.emit_run_event(
                "context.compact_failed", error=str(error), error_details=_details(error)
            )
            return Outcome(error=failed) if failed.retryable else Outcome()
        self._ledger.emit_run_event("context.compact_succeeded")
        self._ledger.emit_run_event("context.compact.completed", duration_ms=_ms(started))
        return Outcome(state=overlay.changes())

    # --- model and tools ---------------------------------------------------------------------------------

    def _bind(self) -> None:
        context, definition = self._context, self._parts.definition
        timeouts_ms = {tool.id: tool.timeout_ms for tool in definition.tools}
        context.llm_client = RecordedModel(
            self._parts.model(), recorder=self._recorder, ledger=self._ledger, budget=self._budget
        )
        context.tools = {
            tool_id: RecordedTool(
                tool_id,
                inner,
                context=context,
                ledger=self._ledger,
                budget=self._budget,
                timeout_ms=timeouts_ms.get(tool_id),
                default_timeout_ms=_tool_timeout_ms(definition),
                checks=self._parts.checks,
            )
            for tool_id, inner in self._parts.tools().items()
        }

    async def _preflight(self) -> None:
        """Ask the tools whether they can work; what those of one's own have said is recorded."""
        checked = {id_: tool for id_, tool in self._parts.tools().items() if hasattr(tool, "preflight")}
        if self._was_prepared_by_place:
            return
        if any(type(tool).preflight is not ToolPlugin.preflight for tool in checked.values()):
            await self._recorder.call("tools", "preflight", "", partial(self._check_tools, checked))
        elif self._recorded is None:
            await self._check_tools(checked)

    async def _check_tools(self, tools: dict[str, Any], _: CallInfo | None = None) -> Outcome:
        for tool_id, inner in tools.items():
            started = time.monotonic()
            try:
                with executing("tool", tool_id), user_code(PatternError, prefix=f"preflight of {tool_id}: "):
                    await inner.preflight(None)
            except Exception as error:  # noqa: BLE001  # whatever it raises is the outcome of this call
                self._note_preflight(tool_id, "error", started, error=str(error))
                failed = coded(error, PatternError)
                self._log_failure("tool.preflight_failed", failed, tool_id=tool_id)
                return Outcome(error=failed)
            self._note_preflight(tool_id, "ok", started)
        return Outcome()

    def _log_failure(self, event: str, error: OpenAgentsError, **fields: Any) -> None:
        log.warning(
            event,
            run_id=self._context.run_id,
            agent_id=self._context.agent_id,
            **fields,
            **described_in_log(error),
            user_error=user_error_of(error),
        )

    def _note_preflight(self, tool_id: str, result: str, started: float, **more: str) -> None:
        self._ledger.emit_run_event(
            "tool.preflight", tool_id=tool_id, result=result, duration_ms=_ms(started), **more
        )

    # --- memory ------------------------------------------------------------------------------------------

    async def _inject(self) -> None:
        if self._recorded is not None and self._was_prepared_by_place and self._memory.is_external:
            self._context.memory_view = dict(self._start.memory_view or {})
            apply_changes(self._context.state, self._recorded.state)
            return
        await self._memory.inject(is_first=self._recorded is None)

    def _limit_the_past(self) -> None:
        """What the memory says of the conversation itself; one of somebody's own need not say anything."""
        memory = self._parts.memory
        self._context.shown_turns = getattr(memory, "shown_turns", None)
        self._context.conversation_keys = frozenset(getattr(memory, "conversation_keys", ()))


def _is_shared(assembler: Any) -> bool:
    """Whether it is one that we ship: those keep no run's state and are shared by runs."""
    return type(assembler) in BUILTIN_ASSEMBLERS.values()


def _compacts(assembler: Any) -> bool:
    return hasattr(assembler, "compact") and type(assembler).compact is not ContextAssemblerPlugin.compact


async def _set_up(pattern: Any, context: RunContext) -> None:
    """Give the pattern its context, by `setup` where it has one (the original's way) and by attribute."""
    if hasattr(pattern, "setup"):
        await pattern.setup(
            agent_id=context.agent_id,
            session_id=context.session_id,
            input_text=context.input_text,
            state=context.state,
            tools=context.tools,
            llm_client=context.llm_client,
            llm_options=context.llm_options,
            event_bus=context.event_bus,
            transcript=context.transcript,
            session_artifacts=context.session_artifacts,
            assembly_metadata=context.assembly_metadata,
            run_request=context.run_request,
            tool_executor=None,
            usage=context.usage,
            artifacts=context.artifacts,
        )
    pattern.context = context


def _tool_timeout_ms(definition: AgentDefinition) -> int | None:
    executor = definition.tool_executor
    return DEFAULT_TOOL_TIMEOUT_MS if executor is not None and executor.type == "safe" else None


def _ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _details(error: BaseException) -> dict[str, Any]:
    return ErrorDetails.from_exception(error).model_dump(exclude_none=True)
