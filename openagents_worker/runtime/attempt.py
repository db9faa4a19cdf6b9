"""The attempt: one execution of a claimed run by one worker. The only place that orders its phases.

The runner claims a run and executes an `Attempt` of it. The code of the run is executed in a task of its own:

1. prepare: read the journal, open the dependencies, build the context and the pattern
2. think: execute the pattern, validate its output
3. remember: let the memory store the turn

Then the task that has called `execute` writes the end. The run finishes with the output or the error of the
phases. If the latch was set, the code is stopped, and `parting` writes how this worker leaves the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from openagents_worker.errors import ExecutionError, OpenAgentsError, PatternError, RunCancelled
from openagents_worker.models import RunRequest
from openagents_worker.models.budget import NO_LIMITS
from openagents_worker.runtime.agent_parts import AgentOfRun
from openagents_worker.runtime.assembly import AgentParts
from openagents_worker.runtime.cancellation import cancellation_of
from openagents_worker.runtime.clock import RunClock
from openagents_worker.runtime.context import AttemptContext, RecordedData
from openagents_worker.runtime.deps import OpenDeps
from openagents_worker.runtime.ending import (
    Ending,
    artifact_list,
    checked_output,
    ending_error,
    usage_so_far,
)
from openagents_worker.runtime.error_snapshot import error_snapshot
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.finishing import NO_STATE, SessionState, finish_run
from openagents_worker.runtime.history import RunHistory, read_history
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.limits import RunLimits
from openagents_worker.runtime.output import DEFAULT_VALIDATION_RETRIES, validated_output
from openagents_worker.runtime.parting import AttemptOutcome, AttemptResult, Parting
from openagents_worker.runtime.prepare import Preparation, Prepared, emit_beginning, emit_resumed
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.retry import Tries, back_off_ms
from openagents_worker.runtime.rules import PREPARE_PART, REMEMBER
from openagents_worker.runtime.run_deadline import RunDeadline
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.state import loaded_state
from openagents_worker.runtime.stopping import EX_DOES_NOT_STOP, CodeStopper
from openagents_worker.runtime.supervision import Supervision
from openagents_worker.runtime.transfer import ended_by_transfer, give_children, output_of
from openagents_worker.runtime.user_code import (
    RunCode,
    class_path,
    coded,
    described_in_log,
    executing,
    user_code,
    user_error_of,
)
from openagents_worker.runtime.working_budget import WorkingBudget
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.formats import BY_PLACE
from openagents_worker.store.scripts import Claimed, WriteResult
from openagents_worker.store.sessions import SessionStore
from openagents_worker.telemetry.logs import get_logger

__all__ = ["EX_DOES_NOT_STOP", "Attempt", "AttemptOutcome", "AttemptResult"]

log = get_logger(__name__)
DEPS_CALL = "deps"  # counts tries to open the dependencies; not a valid call id


class Attempt:
    """One execution of a claimed run by this process.

    Code of the run executes in a task of its own. The task that awaits `execute` only waits: an exception in
    it stops the attempt, and never interrupts the code that writes the end.
    """

    def __init__(
        self,
        claimed: Claimed,
        request: RunRequest,
        *,
        services: Services,
        lease: Lease,
        agent: AgentOfRun,
    ) -> None:
        """If the request cannot be read, `request` has only its ids; see `AgentOfRun.request_error`."""
        self._budget = (request.budget or NO_LIMITS).within(agent.limits)
        self.request = request.model_copy(update={"budget": self._budget})
        self.identity = RunIdentity.of(claimed, request, lease.incarnation)
        self.latch = Latch()
        self._claimed = claimed
        self.agent = agent
        self._services = services
        self._settings = services.settings
        self._store = FencedStore.of(self.identity, services, lease=lease, latch=self.latch)
        self._writer = RunWriter(
            self.identity, services, store=self._store, latch=self.latch, length=claimed.journal_length
        )
        self.facts = RunFacts(claimed, self._store)
        self._code = RunCode(request.run_id, request.agent_id, self.latch, services.marks, lease.incarnation)
        self._limits = RunLimits(self.identity, request.tenant or "", services, store=self._store)
        self.supervision = Supervision(self._code, self.latch)
        self._stopper = CodeStopper(self._code, self.latch, services.settings, services.leave)
        self._clock = RunClock(self._budget.max_duration_ms, claimed.active_ms)
        self._deadline = RunDeadline(self._clock, self.facts, claimed)
        self._tries = Tries.of(claimed, self.facts.at_claim, self._budget)
        # What the phases leave for the end of the run. It may come before any of them has begun.
        self._recorder: Recorder | None = None
        self._context: AttemptContext | None = None
        self._state_before: Mapping[str, str] = {}  # of the session; values as JSON
        self._pattern: Any = None
        self._turn_messages: Any = ()
        self._finish_reason: str | None = None

    # --- from outside ------------------------------------------------------------------------------------

    async def execute(self) -> AttemptResult:
        """Execute the run until it finishes, or until the latch stops it."""
        execution: asyncio.Task[Ending | None] = asyncio.create_task(
            self._execute_phases(), name=f"run {self.identity.run_id}", context=self._code.context()
        )
        try:
            await self._deadline.wait(execution, self.supervision, self.latch)
            return await self.supervision.uninterrupted(lambda: self._end(execution), name="end")
        finally:
            self._break_reference_cycles()

    def interrupt(self, by: BaseException) -> None:
        """Stop because the Celery task of the run got an exception, such as its soft time limit."""
        self.supervision.interrupt(by)

    def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event about the run from outside of its code, for example by the watchdog."""
        self._writer.emit(name, payload)

    def code_in_progress(self) -> dict[str, Any]:
        """The code of the run that still executes: fields of a log line."""
        return self._stopper.in_progress()

    def _break_reference_cycles(self) -> None:
        """Break the reference cycles between the parts of a run, so that its memory is freed at once."""
        if self._context is not None:
            self._context.tools, self._context.functions = {}, None
            self._context.recorder.context = None
            self._context.recorder.spending.given_up = None
        self._context = self._recorder = self._pattern = None

    # --- the phases --------------------------------------------------------------------------------------

    async def _execute_phases(self) -> Ending | None:
        """Prepare, think and remember. Returns how the run ends; None if it was latched."""
        parts: AgentParts | None = None
        try:
            self._stop_if_nothing_to_replay()
            parts = await self.agent.parts(self._claimed, self._store, self.latch)
            with user_code(PatternError):
                async with OpenDeps() as deps:
                    try:
                        prepared = await self._prepare(parts, deps)
                        output = await self._think(prepared)
                        stored_output = checked_output(output, self._settings.max_payload_bytes)
                        await self._remember(prepared, output)
                        await self.facts.held.take_rest(self._state_before, prepared.context.state)
                    finally:
                        if self._recorder is not None:
                            self._recorder.end_parts()
                return self._ending(output=stored_output)
        except RunLatched:
            return None
        except OpenAgentsError as error:
            if self._claimed.is_interrupted:  # it ends as interrupted, whatever its replay has raised
                self.latch.set(LatchReason.CANCELLED)
                return None
            return self._ending(error=self._verdict(error))
        finally:
            if parts is not None and parts.own:
                await self._close(parts)

    def _stop_if_nothing_to_replay(self) -> None:
        """Raises `RunLatched` for an interrupted run without a record: nothing of it may be executed."""
        if self._claimed.is_interrupted and not self._claimed.journal_length:
            self.latch.set(LatchReason.CANCELLED)
            raise RunLatched(LatchReason.CANCELLED)

    async def _close(self, parts: AgentParts) -> None:
        """Close the plugins of this attempt. Errors are logged; they do not change the ending."""
        try:
            with user_code(PatternError):
                await parts.aclose()
        except OpenAgentsError as error:
            self._log_warning("run.plugin_not_closed", error)

    # --- prepare -----------------------------------------------------------------------------------------

    async def _prepare(self, parts: AgentParts, open_deps: OpenDeps) -> Prepared:
        """Read the journal, open the dependencies and create a pattern that is ready to execute.

        From now on all calls go through the recorder.
        """
        history = await read_history(
            self._claimed, self.facts, parts.definition_hash, tries=self._tries, latch=self.latch
        )
        sessions = SessionStore(self._store)
        self._state_before = await self.facts.held.session_state(self._claimed, sessions)
        recorder = self._new_recorder(history)
        emit_beginning(self._writer, self._claimed, self.request, history)
        deps = None if self.request.deps is None else await self._open(open_deps, self.request.deps)
        is_by_place = recorder.rules.format == BY_PLACE  # only then is the preparation a part of its own
        recorder.begin_part(PREPARE_PART if is_by_place else "")
        state = loaded_state(self._state_before, self.identity.session_id)
        context = AttemptContext(self.request, state, recorder, parts.definition.llm, deps=deps)
        give_children(context, self.identity, self._writer, self._services, history)
        self._context, recorder.context = context, RecordedData(context)
        preparation = Preparation(context, parts, sessions, recorder, self._writer, history)
        prepared = await preparation.prepare()
        self._pattern = prepared.pattern
        recorder.checkpoints.store_start()
        emit_resumed(self._writer, self._claimed)
        if is_by_place:
            recorder.begin_part()
        return prepared

    def _new_recorder(self, history: RunHistory) -> Recorder:
        """The recorder of this attempt. It follows the rules under which the run began."""
        self._writer.format = history.rules.format
        recorder = self._recorder = Recorder(
            self.identity,
            history,
            claimed=self._claimed,
            writer=self._writer,
            latch=self.latch,
            max_record_bytes=self._settings.max_payload_bytes,
            facts=self.facts,
        )
        recorder.limits = self._limits
        recorder.budget = WorkingBudget(self._budget, durable=recorder.is_durable)
        self._deadline.apply_to(recorder, history.extended)
        return recorder

    async def _open(self, open_deps: OpenDeps, name: str) -> Any:
        """The value of `context.deps`. If it cannot be made now, the run is suspended for a retry."""
        try:
            return await open_deps.open(name, self._services.assembly.offload.in_thread)
        except OpenAgentsError as error:
            may_retry = error.retryable and self._tries.failed(DEPS_CALL) < self._tries.most
            if not (may_retry and self._claimed.durable):
                raise
            self._log_warning("deps.unavailable", error)
            self.latch.set(LatchReason.RETRY, error=error, call=DEPS_CALL)
            raise RunLatched(LatchReason.RETRY) from error

    # --- think and remember ------------------------------------------------------------------------------

    async def _think(self, prepared: Prepared) -> Any:
        """Execute the pattern. Returns its output, validated against the requested output type."""
        children, output = prepared.context.children, None
        with executing("pattern", class_path(prepared.pattern)), ended_by_transfer(children, self.latch):
            output = await prepared.pattern.execute()
        if (result := children.transferred) is not None:
            await self._check_all_read(prepared.context.recorder)
            return output_of(result)
        output_type = prepared.output_type
        if output_type is not None or getattr(prepared.pattern, "finalized", None) is not None:
            limit = self._budget.max_validation_retries
            attempts = 1 + (DEFAULT_VALIDATION_RETRIES if limit is None else limit)
            attempts *= self._claimed.life  # the attempts of earlier lives are replayed from the journal
            with executing("output_type", output_type.name if output_type is not None else "finalize"):
                output = await validated_output(
                    output,
                    output_type,
                    prepared.pattern,
                    prepared.context,
                    attempts,
                    recorder=prepared.context.recorder,
                    checks=self._services.assembly.checks,
                    offload=self._services.assembly.offload,
                )
        self._turn_messages = getattr(prepared.pattern, "turn_messages", ())
        reason = getattr(prepared.pattern, "finish_reason", None)
        self._finish_reason = reason if isinstance(reason, str) else None
        await self._check_all_read(prepared.context.recorder)
        return output

    async def _remember(self, prepared: Prepared, output: Any) -> None:
        """Let the memory store the turn."""
        recorder = prepared.context.recorder
        recorder.begin_part(REMEMBER)
        await prepared.memory.write_back(output)
        await self._check_all_read(recorder, REMEMBER)

    async def _check_all_read(self, recorder: Recorder, part: str = "") -> None:
        """After a part of the run: raise the latch, the verdict of the recorder, or a replay mismatch."""
        if self.latch.reason is None and recorder.verdict is None:
            await recorder.check_all_read(part)
        if self.latch.reason is not None:
            raise RunLatched(self.latch.reason)
        if recorder.verdict is not None:
            raise recorder.verdict

    # --- the end -----------------------------------------------------------------------------------------

    async def _end(self, execution: asyncio.Task[Ending | None]) -> AttemptResult:
        """Write how the run ends, or how this worker leaves it. In both cases its code has stopped."""
        try:
            if self.latch.reason is None and (ending := self._ending_of(execution)) is not None:
                if self._code.tasks():
                    await self._stopper.stop_left(execution, self._recorder)
                    ending = replace(ending, usage=usage_so_far(self._claimed, self._recorder))
                return await self._finish(ending)
            await self._stopper.stop(execution, self._recorder)
            return await self._leave()
        except RunLatched:  # raised by a write of the end: another worker owns the run, or it was cancelled
            return await self._leave()
        finally:
            self.latch.set(LatchReason.FENCED, detail="the attempt has ended")  # no call begins after this
            await self._limits.close()
            await self.facts.close()
            await self._writer.close()

    def _ending_of(self, execution: asyncio.Task[Ending | None]) -> Ending | None:
        """How the run ends after its work is done; None if it was latched."""
        if execution.cancelled():
            return self._ending(error=ExecutionError("the pattern cancelled itself"))
        # An exception that bypassed `user_code`, for example by a future that closes its coroutine.
        if (error := execution.exception()) is not None:
            return self._ending(error=self._verdict(coded(error, PatternError)))
        return execution.result()

    def _verdict(self, error: OpenAgentsError) -> OpenAgentsError:
        """The error that ends the run: the verdict of the recorder if there is one, else `error`."""
        return ending_error(self._recorder.verdict if self._recorder else None, error)

    def _ending(self, *, output: Any = None, error: OpenAgentsError | None = None) -> Ending:
        if error is not None:
            error.run_id = error.run_id or self.identity.run_id
        return Ending(
            request=self.request,
            usage=usage_so_far(self._claimed, self._recorder),
            artifacts=artifact_list(self._context.artifacts) if self._context else [],
            duration_ms=self._clock.active_ms,
            output=output,
            error=error,
            turn_messages=self._turn_messages,
            finish_reason=self._finish_reason,
            transferred=self._context.children.transferred if self._context else None,
            redact_keys=self._services.assembly.redact_keys,
            summary=self._context.new_summary if self._context else None,
            error_snapshot=error_snapshot(error, self._context, self._services.assembly, self._writer),
        )

    async def _finish(self, ending: Ending) -> AttemptResult:
        """Write the end of the run."""
        state = SessionState(self._state_before, self._context.state) if self._context else NO_STATE
        used = await self._context.children.used_at_end() if self._context else None
        if used is not None:  # the usage, too, may have changed since the ending was made
            ending = replace(ending, usage=usage_so_far(self._claimed, self._recorder), in_children=used)
        return await finish_run(
            self.identity, ending, state, writer=self._writer, send_wakes=self._send_wakes
        )

    async def _finish_as_cancelled(self) -> AttemptResult:
        """Write that the run was cancelled. If another run has interrupted it, its session gets a turn."""
        cancellation = await cancellation_of(self._services.store, self.identity.run_id)
        ending = self._ending(error=RunCancelled(cancellation.reason))
        return await self._finish(cancellation.applied_to(ending, self._pattern))

    async def _leave(self) -> AttemptResult:
        """Write how this worker leaves the run, for the reason of the latch."""
        parting = Parting(
            self.latch,
            self._writer,
            finish=lambda error: self._finish(self._ending(error=error)),
            send_wakes=self._send_wakes,
            back_off_ms=lambda error, call: back_off_ms(
                self._tries.failed(call),
                getattr(error, "retry_after_ms", None),
                self._services.random_unit,
                longest_ms=self._settings.retry_after_max_ms,
            ),
            cancel=self._finish_as_cancelled,
            left_max_ms=round(self._settings.left_to_others_max_s * 1000),
        )
        return await parting.leave()

    async def _send_wakes(self, reply: WriteResult) -> None:
        if reply.wakes:
            await self._services.send_wakes(reply.wakes)

    def _log_warning(self, event: str, error: OpenAgentsError) -> None:
        log.warning(event, **self.identity.ids, **described_in_log(error), user_error=user_error_of(error))
