"""Prepare: from a claimed run to a pattern that can start; recorded as checkpoint 0 for later attempts."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from openagents_worker.agents import AgentDefinition
from openagents_worker.context.base import ContextAssemblerPlugin
from openagents_worker.errors import PatternError
from openagents_worker.models import ErrorDetails, RunBudget, RunRequest
from openagents_worker.runtime.assembly import AgentParts
from openagents_worker.runtime.calls import RecordedModel, RecordedTool
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.journal import PREPARE, Record
from openagents_worker.runtime.ledger import Ledger
from openagents_worker.runtime.output import OutputType
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.state import Overlay, apply_changes
from openagents_worker.runtime.user_code import user_code
from openagents_worker.store.runs import SessionStore

__all__ = ["Prepared", "Preparation", "Start"]

DEFAULT_TOOL_TIMEOUT_MS = 30_000  # the `safe` executor's default in the original


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run started in its session; kept as checkpoint 0, so that every attempt starts there again."""

    transcript_length: int
    artifact_count: int
    definition_hash: str
    memory_view: dict[str, Any] | None = None
    """What an external memory gave; None when the session's own state gives it again."""

    def to_record(self, state: dict[str, Any]) -> Record:
        value = {name: getattr(self, name) for name in self.__slots__}
        return Record(PREPARE, "prepare", "", self.definition_hash, {"ok": value}, state=state)

    @classmethod
    def of(cls, record: Record) -> Start:
        return cls(**record.outcome["ok"])


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything an attempt thinks with. `state_before` is the session's state as JSON by key."""

    pattern: Any
    context: RunContext
    parts: AgentParts
    state_before: dict[str, str]
    output_type: OutputType | None = None


class SessionAtStart:
    """The session as this run sees it: what others appended since is not there."""

    def __init__(self, sessions: SessionStore, start: Start | None) -> None:
        self._sessions = sessions
        self._messages = start.transcript_length if start else None
        self._artifacts = start.artifact_count if start else None

    async def load_messages(self, session_id: str, *, last: int | None = None) -> list[dict[str, Any]]:
        return await self._sessions.load_messages(session_id, last=last, upto=self._messages)

    async def list_artifacts(self, session_id: str, *, last: int | None = None) -> list[Any]:
        return await self._sessions.list_artifacts(session_id, last=last, upto=self._artifacts)

    async def count_messages(self, session_id: str) -> int:
        return await self._sessions.count_messages(session_id) if self._messages is None else self._messages


class Preparation:
    """Carries one attempt from its claim to its prepared context."""

    def __init__(
        self,
        *,
        request: RunRequest,
        parts: AgentParts,
        sessions: SessionStore,
        recorder: Recorder,
        ledger: Ledger,
        budget: RunBudget,
        recorded: Record | None,
        start: Start,
        state_before: dict[str, str],
        state: dict[str, Any],
        durable: bool,
        deps: Any,
    ) -> None:
        self._request = request
        self._parts = parts
        self._recorder = recorder
        self._ledger = ledger
        self._budget = budget
        self._recorded = recorded
        self._start = start
        self._state_before = state_before
        self._durable = durable
        self._session = SessionAtStart(sessions, start)
        self._context = RunContext(request, state, recorder, parts.definition.llm, deps=deps)

    async def carry(self) -> Prepared:
        """In the order of the original: compact, assemble, bind, preflight, inject."""
        wanted = OutputType.of(self._request)
        await self._choose_the_past()
        self._bind()
        if self._recorded is None:
            await self._preflight()
            self._note("context.created")
        await self._inject()
        if wanted is not None:
            self._context.system_prompt_fragments.append(wanted.instruction)
        pattern = self._parts.new_pattern()
        await _set_up(pattern, self._context)
        return Prepared(pattern, self._context, self._parts, self._state_before, wanted)

    def _note(self, name: str, **payload: Any) -> None:
        if self._recorded is None:
            self._ledger.note_of_run(name, **payload)

    # --- context -----------------------------------------------------------------------------------------

    async def _choose_the_past(self) -> None:
        assembler = self._parts.assembler
        given: dict[str, Any] = {
            "request": self._request,
            "session_state": self._context.state,
            "session_manager": self._session,
        }
        if self._recorded is None and _compacts(assembler):
            await self._compact(lambda: assembler.compact(**given))
        self._note("context.assemble.started")
        started = time.monotonic()
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

    async def _compact(self, compact: Callable[[], Awaitable[None]]) -> None:
        self._note("context.compact.started")
        started = time.monotonic()
        try:
            with user_code(PatternError, prefix="context compact: "):
                await compact()
        except Exception as error:  # noqa: BLE001  # a past that could not be shortened is still a past
            self._note("context.compact_failed", error=str(error), error_details=_details(error))
            return
        self._note("context.compact_succeeded")
        self._note("context.compact.completed", duration_ms=round((time.monotonic() - started) * 1000))

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
            )
            for tool_id, inner in self._parts.tools().items()
        }

    async def _preflight(self) -> None:
        for tool_id, inner in self._parts.tools().items():
            if not hasattr(inner, "preflight"):
                continue
            started = time.monotonic()
            try:
                with user_code(PatternError, prefix=f"preflight of {tool_id}: "):
                    await inner.preflight(None)
            except Exception as error:
                self._note(
                    "tool.preflight",
                    tool_id=tool_id,
                    result="error",
                    duration_ms=_ms(started),
                    error=str(error),
                )
                raise
            self._note("tool.preflight", tool_id=tool_id, result="ok", duration_ms=_ms(started))

    # --- memory ------------------------------------------------------------------------------------------

    async def _inject(self) -> None:
        """Fill the memory view; what an external memory gave is recorded and not asked for again."""
        context, memory = self._context, self._parts.memory
        external = bool(getattr(memory, "external", True))
        if self._recorded is not None and external:
            context.memory_view = dict(self._start.memory_view or {})
            apply_changes(context.state, self._recorded.state)
            return
        changes = await self._ask_memory(memory)
        if self._recorded is None and self._durable:
            start = Start(
                self._start.transcript_length,
                self._start.artifact_count,
                self._start.definition_hash,
                context.memory_view if external else None,
            )
            record = start.to_record(changes if external else {})
            await self._recorder.prepare(record, at_once=external or _compacts(self._parts.assembler))

    async def _ask_memory(self, memory: Any) -> dict[str, Any]:
        context = self._context
        self._note("memory.inject.started")
        overlay = Overlay(context.state)
        before, context.state = context.state, overlay  # type: ignore[assignment]  # a mapping, as plugins expect
        try:
            with user_code(PatternError, prefix="memory inject: "):
                await memory.inject(context)
        except Exception as error:
            self._note("memory.inject_failed", error=str(error), error_details=_details(error))
            if self._parts.definition.memory.on_error == "fail":
                raise
            return {}
        finally:
            context.state = before
        apply_changes(context.state, changes := overlay.changes())
        self._note("memory.injected")
        self._note("memory.inject.completed", view_size=len(context.memory_view))
        return changes


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
