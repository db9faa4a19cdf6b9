"""Preparation: the only place that turns a claimed run into a pattern ready to execute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from openagents_worker.context import BUILTIN_ASSEMBLERS
from openagents_worker.context.base import ContextAssemblerPlugin, ContextAssemblyResult
from openagents_worker.context.budget import TokenBudgetAssembler
from openagents_worker.errors import OpenAgentsError, PatternError
from openagents_worker.llm.base import CallInfo
from openagents_worker.llm.limits import REPLY_TOKENS
from openagents_worker.llm.structured import response_format
from openagents_worker.models import ErrorDetails, RunRequest
from openagents_worker.models.budget import NO_LIMITS
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.assembly import AgentParts
from openagents_worker.runtime.calls import guards
from openagents_worker.runtime.calls.functions import RecordedFunctions
from openagents_worker.runtime.calls.model import RecordedModel
from openagents_worker.runtime.calls.tool import RecordedTool
from openagents_worker.runtime.calls.tool_call import ToolRun
from openagents_worker.runtime.compaction import is_summary, summarize, summary_from
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.history import RunHistory
from openagents_worker.runtime.memory_calls import MemoryCalls
from openagents_worker.runtime.original.package import is_original_pattern
from openagents_worker.runtime.output import OutputType
from openagents_worker.runtime.recorder import Outcome, Recorder
from openagents_worker.runtime.session_at_start import SessionAtStart
from openagents_worker.runtime.state import Overlay, apply_changes
from openagents_worker.runtime.toolsets import RunTools
from openagents_worker.runtime.user_code import (
    class_path,
    coded,
    described_in_log,
    executing,
    user_error_of,
)
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.formats import BY_PLACE
from openagents_worker.store.scripts import Claimed
from openagents_worker.store.sessions import SessionStore
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import ToolPlugin
from openagents_worker.tools.toolset import OpenedAtUse

__all__ = ["Prepared", "Preparation", "emit_beginning", "emit_resumed"]

log = get_logger(__name__)

SHOWN_METADATA = {
    "token_counter": "counted_by",
    "kept_tokens": "tokens",
    "omitted_messages": "omitted_messages",
}
"""What the event `context.assemble.completed` shows of the metadata of an assembler, and under which name."""


@quick_init
@dataclass(frozen=True, slots=True)
class Prepared:
    """A pattern that is ready to execute, with its context."""

    pattern: Any
    context: AttemptContext
    parts: AgentParts
    memory: MemoryCalls
    output_type: OutputType | None = None


class Preparation:
    """Prepares one attempt. Its calls of models, tools, memory and assembler are recorded."""

    def __init__(
        self,
        context: AttemptContext,
        parts: AgentParts,
        sessions: SessionStore,
        recorder: Recorder,
        writer: RunWriter,
        history: RunHistory,
    ) -> None:
        self._context = context
        self._parts = parts
        self._recorder = recorder
        self._writer = writer
        self._budget = context.run_request.budget or NO_LIMITS
        self._start_record = history.start_record
        self._start = history.start
        self._session = SessionAtStart(sessions, history.start, history.summary, history.held)
        self._memory = MemoryCalls(
            parts.memory,
            context=context,
            recorder=recorder,
            emit=writer.emit_run_event,
            on_error=parts.definition.memory.on_error,
        )

    async def prepare(self) -> Prepared:
        """Assemble the context, check the tools, inject the memory, in the order of the original SDK."""
        output_type = OutputType.of(self._context.run_request)
        if output_type is not None:
            self._context.output_format = response_format(output_type.name, output_type.schema)
        self._bind_model()
        await self._select_messages()
        await self._bind_tools()
        await self._assemble_context()
        await self._preflight()
        self._emit_once("context.created")
        await self._inject_memory()
        self._set_history_limits()
        if output_type is not None:
            self._context.system_prompt_fragments.append(output_type.instruction)
        pattern = await self._make_pattern()
        return Prepared(pattern, self._context, self._parts, self._memory, output_type)

    async def _make_pattern(self) -> Any:
        """A new pattern with the context of the run."""
        pattern = self._parts.new_pattern()
        if not is_original_pattern(pattern):
            pattern.context = self._context
            return pattern
        from openagents_worker.runtime.original.pattern import (
            OriginalPattern,  # imported late: few agents have such a pattern
        )

        pattern = OriginalPattern(pattern)
        with executing("pattern", class_path(pattern)):
            await pattern.set_context(self._context)
        return pattern

    def _emit_once(self, name: str, **payload: Any) -> None:
        """Emit an event of the run, unless an earlier attempt has emitted it."""
        if self._start_record is None:
            self._writer.emit_run_event(name, **payload)

    @property
    def _was_prepared_by_place(self) -> bool:
        """Whether checkpoint 0 contains the whole preparation, as in runs that are replayed by place."""
        return self._start_record is not None and self._start_record.v == BY_PLACE

    # --- context -----------------------------------------------------------------------------------------

    async def _select_messages(self) -> None:
        """Let an assembler with a token budget select messages. Checkpoint 0 holds what it has selected.

        Another worker may count tokens in another way: it must not select others.
        """
        assembler = self._parts.assembler
        if self._start_record is None and isinstance(assembler, TokenBudgetAssembler):
            selected = await assembler.select(
                request=self._context.run_request, session_manager=self._session
            )
            self._start = replace(self._start, selection=selected)
            omitted = selected.metadata.get("omitted_messages")
            if omitted and not selected.ranges and selected.summarize is None:
                self._log("context.no_turn_fits", omitted_messages=omitted)

    async def _assemble_context(self) -> None:
        """Let the assembler compact and select transcript and artifacts for the context."""
        assembler = self._parts.assembler
        if not _is_builtin(assembler):
            with suppress(AttributeError):  # a custom assembler may call models and tools
                assembler.context = self._context
        arguments: dict[str, Any] = {
            "request": self._context.run_request,
            "session_state": self._context.state,
            "session_manager": self._session,
        }
        if _implements_compact(assembler) and not self._was_prepared_by_place:
            with suppress(OpenAgentsError):  # all tries failed: continue with the long transcript
                await self._recorder.call(
                    "context", "compact", "", partial(self._compact, assembler.compact, arguments)
                )
        selection = self._start.selection
        if isinstance(assembler, TokenBudgetAssembler) and selection and selection.summarize:
            await self._summarize(assembler, *selection.summarize)
        self._emit_once("context.assemble.started")
        started = time.monotonic()
        with executing("context", class_path(assembler)):
            assembled = await self._assembled(assembler, arguments)
        self._context.transcript = list(assembled.transcript)
        self._context.session_artifacts = list(assembled.session_artifacts)
        self._context.assembly_metadata = dict(assembled.metadata)
        self._emit_once(
            "context.assemble.completed",
            transcript_size=len(assembled.transcript),
            artifact_count=len(assembled.session_artifacts),
            duration_ms=round((time.monotonic() - started) * 1000),
            **{
                shown: assembled.metadata[name]
                for name, shown in SHOWN_METADATA.items()
                if name in assembled.metadata
            },
        )

    async def _assembled(self, assembler: Any, arguments: dict[str, Any]) -> ContextAssemblyResult:
        """What the assembler gives to the run: the same in every attempt."""
        selection = self._start.selection
        if selection is None or not isinstance(assembler, TokenBudgetAssembler):
            result: ContextAssemblyResult = await assembler.assemble(**arguments)
            return result
        return await assembler.assembled(
            selection, request=arguments["request"], session_manager=self._session
        )

    async def _summarize(self, assembler: TokenBudgetAssembler, begin: int, end: int) -> None:
        """Let the model summarize the oldest messages: a recorded call. The end of the run stores it."""

        async def compact(**_: Any) -> dict[str, Any]:
            return await summarize(assembler, begin, end, context=self._context, session=self._session)

        value = None
        with suppress(OpenAgentsError):  # all tries failed: continue with the messages that fit
            value = await self._recorder.call("context", "compact", "", partial(self._compact, compact, {}))
        summary = summary_from(value, self._session)
        if summary is not None:
            self._session.current_summary = summary
            if summary.messages <= self._start.transcript_length:  # held turns have no place in it yet
                self._context.new_summary = summary

    async def _compact(
        self, compact: Callable[..., Awaitable[Any]], arguments: dict[str, Any], _: CallInfo
    ) -> Outcome:
        self._writer.emit_run_event("context.compact.started")
        started, overlay = time.monotonic(), Overlay(self._context.state)
        try:
            path = class_path(self._parts.assembler)
            with executing("context", path, wrap=PatternError, prefix="context compact: "):
                value = await compact(**{**arguments, "session_state": overlay})
        except Exception as error:  # noqa: BLE001 - the run can continue with the long transcript
            coded_error = coded(error, PatternError)
            self._log_failure("context.compact_failed", coded_error)
            self._writer.emit_run_event(
                "context.compact_failed", error=str(error), error_details=_details(error)
            )
            return Outcome(error=coded_error) if coded_error.retryable else Outcome()
        self._writer.emit_run_event("context.compact_succeeded")
        self._writer.emit_run_event("context.compact.completed", duration_ms=_elapsed_ms(started))
        return Outcome(value=value if is_summary(value) else None, state=overlay.changes())

    # --- model and tools ---------------------------------------------------------------------------------

    def _bind_model(self) -> None:
        """Put the recorded model client into the context."""
        self._context.llm_client = RecordedModel(
            self._parts.model(),
            recorder=self._recorder,
            writer=self._writer,
            reply_tokens=self._context.llm_options.max_tokens or REPLY_TOKENS,
            output_format=self._context.output_format,
        )

    async def _bind_tools(self) -> None:
        """Put the recorded tools into the context: those that the run began with."""
        tools = RunTools(self._parts, self._context, self._recorder, self._start_record)
        if self._start_record is None:
            self._recorder.checkpoints.set_start(
                self._start.to_record(self._recorder.rules.format, tools.at_start())
            )
        self._recorder.changed_tools = tools.changed()
        most = tools.rules.max_concurrency
        slots = None if most is None else asyncio.Semaphore(most)
        run = ToolRun(self._context, self._writer, self._budget, self._parts.checks, guards.GUARDS, slots)
        self._context.tools = {tool.tool_id: RecordedTool(tool, run) for tool in await tools.all()}
        self._context.functions = RecordedFunctions(self._context, self._writer, self._parts.offload)

    async def _preflight(self) -> None:
        """Call the `preflight` of the tools. Recorded if a custom tool overrides it."""
        if not self._parts.toolsets:
            return
        checked = {
            id_: tool for id_, tool in self._parts.single_tools().items() if hasattr(tool, "preflight")
        }
        for toolset_id, toolset in self._parts.toolsets.items():
            if isinstance(toolset, OpenedAtUse):
                prefix = f"toolset {toolset_id}: "
                with executing("tool", toolset_id, wrap=PatternError, prefix=prefix):
                    await toolset.warm_up(self._context)
        if self._was_prepared_by_place:
            return
        if any(type(tool).preflight is not ToolPlugin.preflight for tool in checked.values()):
            await self._recorder.call("tools", "preflight", "", partial(self._check_tools, checked))
        elif self._start_record is None:
            await self._check_tools(checked)

    async def _check_tools(self, tools: dict[str, Any], _: CallInfo | None = None) -> Outcome:
        for tool_id, tool in tools.items():
            started = time.monotonic()
            try:
                prefix = f"preflight of {tool_id}: "
                with executing("tool", tool_id, wrap=PatternError, prefix=prefix):
                    await tool.preflight(None)
            except Exception as error:  # noqa: BLE001 - any error is the outcome of this call
                self._emit_preflight(tool_id, "error", started, error=str(error))
                coded_error = coded(error, PatternError)
                self._log_failure("tool.preflight_failed", coded_error, tool_id=tool_id)
                return Outcome(error=coded_error)
            self._emit_preflight(tool_id, "ok", started)
        return Outcome()

    def _log_failure(self, event: str, error: OpenAgentsError, **fields: Any) -> None:
        self._log(event, **fields, **described_in_log(error), user_error=user_error_of(error))

    def _log(self, event: str, **fields: Any) -> None:
        log.warning(event, run_id=self._context.run_id, agent_id=self._context.agent_id, **fields)

    def _emit_preflight(self, tool_id: str, result: str, started: float, **more: str) -> None:
        self._writer.emit_run_event(
            "tool.preflight", tool_id=tool_id, result=result, duration_ms=_elapsed_ms(started), **more
        )

    # --- memory ------------------------------------------------------------------------------------------

    async def _inject_memory(self) -> None:
        if self._start_record is not None and self._was_prepared_by_place and self._memory.is_external:
            self._context.memory_view = dict(self._start.memory_view or {})
            apply_changes(self._context.state, self._start_record.state)
            return
        await self._memory.inject(is_first=self._start_record is None)

    def _set_history_limits(self) -> None:
        """Copy from the memory how much of the conversation it shows. Custom memories need not say it."""
        memory = self._parts.memory
        self._context.shown_turns = getattr(memory, "shown_turns", None)
        self._context.conversation_keys = frozenset(getattr(memory, "conversation_keys", ()))


def _is_builtin(assembler: Any) -> bool:
    """Whether an assembler is built in. Built-in ones keep no state of a run and are shared by runs."""
    return type(assembler) in BUILTIN_ASSEMBLERS.values()


def _implements_compact(assembler: Any) -> bool:
    return hasattr(assembler, "compact") and type(assembler).compact is not ContextAssemblerPlugin.compact


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _details(error: BaseException) -> dict[str, Any]:
    return ErrorDetails.from_exception(error).model_dump(exclude_none=True)


# --- the first events of an attempt ----------------------------------------------------------------------


def emit_beginning(writer: RunWriter, claimed: Claimed, request: RunRequest, history: RunHistory) -> None:
    """Emit the first events of the run, or those of a retry."""
    if claimed.retries:
        writer.emit_run_event(
            "run.resume_attempted",
            checkpoint_id=_last_checkpoint_id(writer.run_id, claimed),
            error_type=claimed.last_error,
            error_code=claimed.last_error,
            attempt_index=claimed.retries,
        )
    if history.start_record is not None:
        return
    if claimed.attempt == 1:
        writer.emit_run_events(("run.requested", "session.run.started"), input_text=request.input_text)
        writer.emit_run_event("run.validated")
    writer.emit_run_event("session.acquired")


def emit_resumed(writer: RunWriter, claimed: Claimed) -> None:
    """Emit that a retried run is prepared and continues from its last checkpoint."""
    if claimed.retries:
        checkpoint_id = _last_checkpoint_id(writer.run_id, claimed)
        writer.emit_run_event(
            "run.resume_succeeded", checkpoint_id=checkpoint_id, attempt_index=claimed.retries
        )


def _last_checkpoint_id(run_id: str, claimed: Claimed) -> str | None:
    length = claimed.journal_length
    return f"{run_id}:step:{length - 1}" if length else None
