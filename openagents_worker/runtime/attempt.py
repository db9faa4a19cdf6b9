"""The attempt: one execution of a claimed run by one worker. The only place that orders its phases.

Prepare, execute the pattern, let the memory store the turn, finish. If the latch stops the attempt earlier,
`parting` ends it.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from contextvars import copy_context
from typing import Any

from openagents_worker.errors import (
    AgentNotFoundError,
    BudgetExhausted,
    ExecutionError,
    OpenAgentsError,
    OtherFormat,
    PatternError,
    RedisUnreachable,
)
from openagents_worker.jsontext import loads
from openagents_worker.models import RunArtifact, RunBudget, RunRequest, RunUsage
from openagents_worker.runtime.assembly import AgentParts, Assembly
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.deps import opened_deps
from openagents_worker.runtime.ending import Ending, checked_output
from openagents_worker.runtime.journal import CHECK, Record, checks_of, read_pages
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.marks import Marks, marked
from openagents_worker.runtime.output import DEFAULT_VALIDATION_RETRIES, validated_output
from openagents_worker.runtime.parting import AttemptOutcome, AttemptResult, Parting
from openagents_worker.runtime.prepare import Preparation, Prepared, RunStart
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.replay import ReplayByContent
from openagents_worker.runtime.replay_by_place import ReplayByPlace
from openagents_worker.runtime.retry import DEFAULT_MAX_RESUME_ATTEMPTS, back_off_ms
from openagents_worker.runtime.rules import REMEMBER, Rules
from openagents_worker.runtime.state import apply_changes
from openagents_worker.runtime.user_code import (
    RunCode,
    class_path,
    coded,
    current_run,
    described,
    described_in_log,
    executing,
    user_code,
    user_error_of,
)
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.facts import FactKind, Facts
from openagents_worker.store.formats import BEGUN, BY_PLACE, WRITTEN, translate_parse_errors
from openagents_worker.store.scripts import Claimed, Wake, WriteResult
from openagents_worker.store.sessions import SessionStore
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.telemetry.sentry import report_unless_logged
from openagents_worker.tools.offload import work_off_loop

__all__ = ["EX_DOES_NOT_STOP", "Attempt", "AttemptOutcome", "AttemptResult"]

log = get_logger(__name__)

EX_DOES_NOT_STOP = 70  # EX_SOFTWARE of sysexits.h
PREPARE_PART = "prepare"  # the part of a run before its pattern, in runs that are replayed by place
DEPS_CALL = "deps"  # counts tries to open the dependencies; not a valid call id


class Attempt:
    """One execution of a claimed run by this process."""

    def __init__(
        self,
        claimed: Claimed,
        request: RunRequest,
        *,
        store: AsyncStore,
        lease: Lease,
        assembly: Assembly,
        settings: Settings,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        random_unit: Callable[[], float] = random.random,
        leave: Callable[[int], object] = os._exit,
        marks: Marks | None = None,
        request_error: OpenAgentsError | None = None,
    ) -> None:
        """`leave(exit_code)` ends the process when code of the run cannot be stopped.

        `marks` shows another process which code executes. `request_error` is set if the request cannot be
        read; `request` then has only its ids, and the run fails or is left to others. `random_unit` returns
        a number from 0 to 1, for the jitter of retries.
        """
        self._budget = (request.budget or RunBudget()).within(assembly.limits(request.agent_id))
        self.request = request.model_copy(update={"budget": self._budget})
        self.latch = Latch()
        self._claimed = claimed
        self._request_error = request_error
        self._store = store
        self._lease = lease
        self._assembly = assembly
        self._settings = settings
        self._send_wakes = send_wakes
        self._random_unit = random_unit
        self._leave = leave
        self._limits = settings.time_limits
        self._started = time.monotonic()
        self._durable = claimed.durable
        self._writer = RunWriter(
            store=store,
            lease=lease,
            run_id=self.request.run_id,
            fence=claimed.fence,
            attempt=claimed.attempt,
            latch=self.latch,
            ids=self._ids,
            preview_chars=settings.event_preview_chars,
            length=claimed.journal_length,
            redact_keys=assembly.redact_keys,
            max_event_bytes=settings.max_payload_bytes,
        )
        self._sessions = SessionStore(self._writer)
        self._recorder: Recorder | None = None
        self._context: RunContext | None = None
        self._state_before: dict[str, str] = {}
        self._turn_messages: Any = ()
        self._finish_reason: str | None = None
        self._code = RunCode(self.request.run_id, self.request.agent_id, self.latch, marks, lease.incarnation)
        self.is_abandoned = False
        """Whether the attempt was interrupted while this worker still owned the run: it must be released."""

    async def execute(self) -> AttemptResult:
        """Execute the run until it finishes, or until the latch stops it."""
        try:
            ending = await self._execute_until_latched()
            return await (self._parting.leave() if ending is None else self._finish(ending))
        except RunLatched:
            return await self._parting.leave()
        finally:
            self.latch.set(LatchReason.FENCED, detail="the attempt has ended")  # no call begins after this
            await self._writer.close()
            self._break_reference_cycles()

    def interrupt(self, by: BaseException) -> None:
        """Stop because the task that awaits this attempt got an exception: Celery's soft time limit, or a
        cancellation."""
        if isinstance(by, Exception):
            error = PatternError(described(by), hint="the soft time limit of the Celery task is over")
            error.__cause__ = by
            self.latch.set(LatchReason.TIME_LIMIT, error=error)
        else:
            self.is_abandoned = self.is_abandoned or self.latch.reason is not LatchReason.FENCED
            self.latch.set(LatchReason.FENCED, detail="abandoned")

    @property
    def mark(self) -> bytes:
        """The mark for the task that executes this attempt, see `marks`."""
        return self._code.mark()

    def code_in_progress(self) -> dict[str, Any]:
        """The code of the run that still executes: fields of a log line."""
        return {
            "run_id": self.request.run_id,
            "agent_id": self.request.agent_id,
            "in_threads": self._code.off_loop.names(),
            "tasks": sorted(task.get_name() for task in self._code.tasks()),
        }

    def _break_reference_cycles(self) -> None:
        """Break the reference cycles between the parts of a run, so that its memory is freed at once."""
        if self._context is not None:
            self._context.tools = {}
        self._context = self._recorder = None

    # --- work --------------------------------------------------------------------------------------------

    async def _execute_until_latched(self) -> Ending | None:
        """The ending of the run; None if it was latched. In both cases its code has stopped."""
        context = copy_context()
        context.run(current_run.set, self._code)
        context.run(marked.set, self.mark)
        context.run(work_off_loop.set, self._code.off_loop)
        execution = asyncio.create_task(
            self._execute_phases(), name=f"run {self.request.run_id}", context=context
        )
        execution_or_latch: set[asyncio.Future[Any]] = {execution, self.latch.is_set}
        try:
            await asyncio.wait(
                execution_or_latch, timeout=self._time_left_s(), return_when=asyncio.FIRST_COMPLETED
            )
            if not execution.done() and self.latch.reason is None:
                self.latch.set(LatchReason.TIME_LIMIT, error=self._duration_exhausted())
        except asyncio.CancelledError:  # the event loop is being closed; other workers recover the run
            self.latch.set(LatchReason.FENCED, detail="abandoned")
            await self._stop_code(execution)
            raise
        if self.latch.reason is not None:
            await self._stop_code(execution)
            return None
        if execution.cancelled():
            return self._ending(error=ExecutionError("the pattern cancelled itself"))
        # An exception that bypassed `user_code`, for example by a future that closes its coroutine.
        if (error := execution.exception()) is not None:
            return self._ending(error=self._verdict(coded(error, PatternError)))
        return execution.result()

    async def _execute_phases(self) -> Ending | None:
        """Make the parts of the agent, execute the run and return its ending; None if it was latched."""
        if self._request_error is not None:
            return self._end_without_request(self._request_error)
        agent_id = self.request.agent_id
        parts: AgentParts | None = None
        try:
            with user_code(PatternError):
                parts = self._assembly.parts(agent_id)
        except OpenAgentsError as error:
            if agent_id in self._assembly.unavailable:
                self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
                return None
            if agent_id not in self._assembly.hashes and isinstance(error, AgentNotFoundError):
                return await self._end_without_agent(error)
            return self._ending(error=error)
        try:
            with user_code(PatternError):
                return self._ending(output=await self._produce_output(parts))
        except RunLatched:
            return None
        except OpenAgentsError as error:
            return self._ending(error=self._verdict(error))
        finally:
            await self._close(parts)

    async def _produce_output(self, parts: AgentParts) -> Any:
        """Execute the phases of the run and return its output. All calls go through the recorder."""
        start_record, start = await self._read_journal(parts)
        self._emit_beginning(start_record)
        recorder = self._recorder
        assert recorder is not None
        async with AsyncExitStack() as exit_stack:
            deps = await self._open_deps(exit_stack)
            recorder.begin(PREPARE_PART if recorder.rules.format == BY_PLACE else "")
            try:
                prepared = await self._prepare(parts, start_record, start, deps)
                if recorder.rules.format == BY_PLACE:
                    recorder.begin()
                output = await self._execute_pattern(prepared)
                recorder.begin(REMEMBER)
                await prepared.memory.write_back(output)
                await self._check_all_read(REMEMBER)
            finally:
                recorder.end()
            return checked_output(output, self._settings.max_payload_bytes)

    def _end_without_request(self, error: OpenAgentsError) -> Ending | None:
        """Fail the run, or leave it to others if another version of this library can read its request."""
        if isinstance(error, OtherFormat):
            self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
            return None
        return self._ending(error=error)

    async def _end_without_agent(self, error: AgentNotFoundError) -> Ending | None:
        """The agent is unknown here. If a worker has announced it, leave the run to others; else fail."""
        key = self._writer.keys("agents")
        if not await self._writer.ask(lambda r: r.hexists(key, self.request.agent_id)):
            return self._ending(error=error)
        self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
        return None

    async def _close(self, parts: AgentParts) -> None:
        """Close the plugins of this attempt. Errors are logged; they do not change the ending."""
        try:
            with user_code(PatternError):
                await parts.aclose()
        except OpenAgentsError as error:
            log.warning(
                "run.plugin_not_closed",
                **self._ids,
                **described_in_log(error),
                user_error=user_error_of(error),
            )

    # --- prepare -----------------------------------------------------------------------------------------

    async def _open_deps(self, exit_stack: AsyncExitStack) -> Any:
        """The value of `context.deps`. If it cannot be made now, the run is suspended for a retry."""
        try:
            return await exit_stack.enter_async_context(
                opened_deps(self.request.deps, self._assembly.offload.in_thread)
            )
        except OpenAgentsError as error:
            if not (error.retryable and self._durable and self._tries.get(DEPS_CALL, 0) < self._max_tries):
                raise
            log.warning(
                "deps.unavailable", **self._ids, **described_in_log(error), user_error=user_error_of(error)
            )
            self.latch.set(LatchReason.RETRY, error=error, call=DEPS_CALL)
            raise RunLatched(LatchReason.RETRY) from error

    async def _read_journal(self, parts: AgentParts) -> tuple[Record | None, RunStart]:
        """Read the journal and make the recorder.

        Returns checkpoint 0, which is None in the first attempt, and where the run starts in its session.
        """
        records = await self._records()
        start_record = records.pop(0) if records else None
        current_start = RunStart(self._claimed.messages, self._claimed.artifacts, parts.definition_hash)
        start = RunStart.of(start_record) if start_record else current_start
        state_before = self._claimed.session_state
        if state_before is None:
            state_before = await self._sessions.load_state_texts(self.request.session_id)
        self._state_before = state_before
        self._recorder = Recorder(
            run_id=self.request.run_id,
            uid=self._claimed.uid,
            rules=self._replay_rules(start_record, [record for record in records if record.kind != CHECK]),
            position=self._claimed.journal_length,
            writer=self._writer,
            latch=self.latch,
            retries=self._claimed.retries,
            tries=self._tries,
            noted=self._noted,
            max_tries=self._max_tries,
            life=self._claimed.life,
            durable=self._durable,
            max_record_bytes=self._settings.max_payload_bytes,
            definition_changed=start.definition_hash != current_start.definition_hash,
            transcript_length=start.transcript_length,
            on_record=self._apply_record,
            checks=checks_of(records, self._claimed.life),
        )
        return start_record, start

    async def _records(self) -> list[Record]:
        """All records of the journal. If one has another format, the run is left to others."""
        pages = read_pages(self._writer.journal_page, self._claimed.journal, self._claimed.journal_length)
        records: list[Record] = []
        async for text in pages:
            try:
                records.append(Record.from_json(text, len(records)))
            except OtherFormat as error:
                # Rare: the claim has already checked the format in the run record.
                self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
                raise RunLatched(LatchReason.LEFT_TO_OTHERS) from error
        return records

    def _replay_rules(self, start_record: Record | None, records: list[Record]) -> Rules:
        """The replay rules of the run. Checkpoint 0 holds the format under which it began."""
        format_ = start_record.v if start_record is not None else BEGUN
        kind = ReplayByPlace if format_ == BY_PLACE else ReplayByContent
        rules = kind(records, life=self._claimed.life, latch=self.latch, tries=self._tries)
        self._writer.format = rules.format
        return rules

    async def _prepare(
        self, parts: AgentParts, start_record: Record | None, start: RunStart, deps: Any
    ) -> Prepared:
        """Create the context and a pattern that is ready to execute."""
        recorder = self._recorder
        assert recorder is not None
        with translate_parse_errors(WRITTEN, session_id=self.request.session_id):
            state = {key: loads(text) for key, text in self._state_before.items()}
        self._context = RunContext(self.request, state, recorder, parts.definition.llm, deps=deps)
        prepared = await Preparation(
            context=self._context,
            parts=parts,
            sessions=self._sessions,
            recorder=recorder,
            writer=self._writer,
            budget=self._budget,
            start_record=start_record,
            start=start,
        ).prepare()
        recorder.store_start()
        if self._claimed.retries:
            self._emit_run_event(
                "run.resume_succeeded", checkpoint_id=self._checkpoint_id, attempt_index=self._claimed.retries
            )
        return prepared

    @property
    def _tries(self) -> dict[str, int]:
        """How often each call has failed and was retried later, by the name of its fact."""
        return Facts(self._claimed.facts).counts(FactKind.TRIES)

    @property
    def _noted(self) -> dict[str, dict[str, Any]]:
        """What earlier attempts noted about calls that are not recorded yet, by call id."""
        notes = {fact.id: fact.value() for fact in Facts(self._claimed.facts).of(FactKind.RESPONSE)}
        return {call: value for call, value in notes.items() if isinstance(value, dict)}

    @property
    def _max_tries(self) -> int:
        limit = self._budget.max_resume_attempts
        return DEFAULT_MAX_RESUME_ATTEMPTS if limit is None else limit

    def _apply_record(self, record: Record) -> None:
        """Apply the state changes and artifacts of a recorded call to the context of the run."""
        assert self._context is not None
        apply_changes(self._context.state, record.state)
        for artifact in record.artifacts:
            self._context.artifacts.append(RunArtifact.model_validate(artifact))

    def _emit_beginning(self, start_record: Record | None) -> None:
        """Emit the first events of the run, or those of a retry."""
        if self._claimed.retries:
            self._emit_run_event(
                "run.resume_attempted",
                checkpoint_id=self._checkpoint_id,
                error_type=self._claimed.last_error,
                error_code=self._claimed.last_error,
                attempt_index=self._claimed.retries,
            )
        if start_record is not None:
            return
        if self._claimed.attempt == 1:
            self._emit_run_event("run.requested", input_text=self.request.input_text)
            self._emit_run_event("session.run.started", input_text=self.request.input_text)
            self._emit_run_event("run.validated")
        self._emit_run_event("session.acquired")

    @property
    def _checkpoint_id(self) -> str | None:
        length = self._claimed.journal_length
        return f"{self.request.run_id}:step:{length - 1}" if length else None

    # --- think -------------------------------------------------------------------------------------------

    async def _execute_pattern(self, prepared: Prepared) -> Any:
        """Execute the pattern. Returns its output, validated against the requested output type."""
        recorder = self._recorder
        assert recorder is not None
        with executing("pattern", class_path(prepared.pattern)):
            output = await prepared.pattern.execute()
        if prepared.output_type is not None:
            limit = self._budget.max_validation_retries
            attempts = 1 + (DEFAULT_VALIDATION_RETRIES if limit is None else limit)
            attempts *= self._claimed.life  # the attempts of earlier lives are replayed from the journal
            with executing("output_type", prepared.output_type.name):
                output = await validated_output(
                    output,
                    prepared.output_type,
                    prepared.pattern,
                    prepared.context,
                    attempts,
                    recorder=recorder,
                    checks=self._assembly.checks,
                    offload=self._assembly.offload,
                )
        self._turn_messages = getattr(prepared.pattern, "turn_messages", ())
        reason = getattr(prepared.pattern, "finish_reason", None)
        self._finish_reason = reason if isinstance(reason, str) else None
        await self._check_all_read()
        return output

    async def _check_all_read(self, part: str = "") -> None:
        """After a part of the run: raise the latch, the verdict of the recorder, or a replay mismatch."""
        recorder = self._recorder
        assert recorder is not None
        if self.latch.reason is None and recorder.verdict is None:
            await recorder.check_all_read(part)
        if self.latch.reason is not None:
            raise RunLatched(self.latch.reason)
        if recorder.verdict is not None:
            raise recorder.verdict

    def _verdict(self, error: OpenAgentsError) -> OpenAgentsError:
        """The error that ends the run: the verdict of the recorder if there is one, else `error`."""
        verdict = self._recorder.verdict if self._recorder else None
        if verdict is None or verdict is error:
            return error
        if verdict.__cause__ is None and error.__cause__ is not verdict:
            verdict.__cause__ = error
        return verdict

    async def _stop_code(self, execution: asyncio.Task[Any]) -> None:
        """Stop all code of the run. Calls that may still end are recorded first; the rest is cancelled.

        If code does not stop within the grace period, the process exits: the next run of the session must
        not execute beside it.
        """
        recorder = self._recorder
        if recorder is not None and self.latch.lets_calls_end:
            quiet = asyncio.create_task(recorder.wait_for_calls(), name=f"quiet {self.request.run_id}")
            stop_now = asyncio.create_task(self.latch.wait_stop_now(), name=f"stop {self.request.run_id}")
            await asyncio.wait({quiet, stop_now}, return_when=asyncio.FIRST_COMPLETED)
            quiet.cancel()
            stop_now.cancel()
        began = time.monotonic()
        while self._code_runs(execution):
            left_s = self._grace_s - (time.monotonic() - began)
            if left_s <= 0:
                self._exit_for_code_that_does_not_stop()
                return
            if recorder is not None:
                recorder.cancel_calls()
            tasks = self._unfinished_tasks(execution)
            for task in tasks:
                task.cancel()
            pause_s = min(left_s, self._limits.cancel_grace_s / 3)  # a pattern may swallow a cancellation
            if tasks:
                done, _ = await asyncio.wait(tasks, timeout=pause_s)
                _retrieve_exceptions(done)
            else:
                await self._code.off_loop.wait(pause_s)
        _retrieve_exceptions({execution})

    def _code_runs(self, execution: asyncio.Task[Any]) -> bool:
        """Whether code of the run still executes that must stop before the attempt ends.

        A run that is retried keeps its session, so a thread of a timed-out call may continue.
        """
        waits_for_threads = self.latch.reason is not LatchReason.RETRY
        return bool(self._unfinished_tasks(execution) or (waits_for_threads and self._code.off_loop.names()))

    def _unfinished_tasks(self, execution: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
        return {task for task in self._code.tasks() | {execution} if not task.done()}

    @property
    def _grace_s(self) -> float:
        """Seconds that code of the run has to stop. Shorter if another worker may own the run."""
        grace_s = self._settings.stop_grace_s
        if self.latch.reason is LatchReason.FENCED:
            return min(self._limits.cancel_grace_s, grace_s)
        return grace_s

    def _exit_for_code_that_does_not_stop(self) -> None:
        """Log what does not stop and end the process."""
        log.error(
            "run.does_not_stop",
            reason=str(self.latch.reason),
            after_s=self._grace_s,
            exit_code=EX_DOES_NOT_STOP,
            **self.code_in_progress(),
        )
        line_groups.flush()
        self._leave(EX_DOES_NOT_STOP)
        self.latch.set(LatchReason.FENCED, detail="its code does not stop")  # if `leave` returns, as in tests

    def _time_left_s(self) -> float | None:
        """Seconds left of `max_duration_ms`. Time in which the run was suspended is not counted."""
        limit = self._budget.max_duration_ms
        if limit is None:
            return None
        return max(0.0, (limit - self._claimed.active_ms) / 1000 - (time.monotonic() - self._started))

    def _duration_exhausted(self) -> BudgetExhausted:
        limit = self._budget.max_duration_ms or 0
        return BudgetExhausted(
            f"Run duration limit ({limit}ms) exceeded", kind="duration", current=self._active_ms, limit=limit
        )

    @property
    def _active_ms(self) -> int:
        return self._claimed.active_ms + round((time.monotonic() - self._started) * 1000)

    # --- finish ------------------------------------------------------------------------------------------

    def _ending(self, *, output: Any = None, error: OpenAgentsError | None = None) -> Ending:
        """How the run ends with this output or error."""
        if error is not None:
            error.run_id = error.run_id or self.request.run_id
        return Ending(
            request=self.request,
            usage=self._recorder.usage if self._recorder else _usage_so_far(self._claimed),
            artifacts=_as_list(self._context.artifacts) if self._context else [],
            duration_ms=self._active_ms,
            output=output,
            error=error,
            turn_messages=self._turn_messages,
            finish_reason=self._finish_reason,
            redact_keys=self._assembly.redact_keys,
        )

    async def _finish(self, ending: Ending) -> AttemptResult:
        """Write the end of the run. If it cannot be stored, write a bare failure instead."""
        stored = ending.stored(
            self._state_before if self._context else {}, self._context.state if self._context else {}
        )
        try:
            reply = await self._writer.finish(**stored.arguments)
        except Exception as error:
            # For example, it contains a lone surrogate that passed the checks.
            log.exception("run.end_not_stored", run_id=self.request.run_id)
            stored = ending.bare(f"the run's end cannot be stored: {described(error)}")
            reply = await self._writer.finish(**stored.arguments)
        await self._send_wakes_of(reply)
        ending = stored.ending
        self._log_end(ending)
        if ending.not_stored:
            log.warning("run.not_all_stored", run_id=self.request.run_id, not_stored=ending.not_stored)
        return AttemptResult(
            AttemptOutcome.FINISHED,
            stop_reason=ending.stop_reason,
            error=ending.details,
            life=self._claimed.life,
        )

    def _log_end(self, ending: Ending) -> None:
        """Log the end of the run in one line. A failure has the traceback of the user code that raised it."""
        fields: dict[str, Any] = {
            **self._ids,
            "stop_reason": str(ending.stop_reason),
            "attempts": self._claimed.attempt,
        }
        if ending.error is None or ending.state == "cancelled":
            log.info("run.ended", **fields)
            return
        raised = user_error_of(ending.error)
        log.error("run.failed", **fields, **described_in_log(ending.error), user_error=raised)
        report_unless_logged(raised)

    @property
    def _parting(self) -> Parting:
        return Parting(
            self.latch,
            self._writer,
            finish=lambda error: self._finish(self._ending(error=error)),
            send_wakes=self._send_wakes_of,
            back_off_ms=lambda error, call: back_off_ms(
                self._tries.get(call, 0),
                getattr(error, "retry_after_ms", None),
                self._random_unit,
                longest_ms=self._settings.retry_after_max_ms,
            ),
            why_cancelled=self._why_cancelled,
            left_max_ms=round(self._settings.left_to_others_max_s * 1000),
        )

    async def _why_cancelled(self) -> str:
        """The reason given with the cancellation, from the run record."""
        key = self._store.keys("run", self.request.run_id)
        try:
            reason = await self._store.ask(lambda r: r.hget(key, "cancel_reason"))
        except RedisUnreachable:  # end the run without the reason
            reason = None
        return str(reason or "cancelled")

    async def _send_wakes_of(self, reply: WriteResult) -> None:
        if reply.wakes:
            await self._send_wakes(reply.wakes)

    def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event about the run from outside of its code, for example by the watchdog."""
        self._writer.emit(name, payload)

    def _emit_run_event(self, name: str, **payload: Any) -> None:
        self._writer.emit_run_event(name, **payload)

    @property
    def _ids(self) -> dict[str, Any]:
        return {
            "agent_id": self.request.agent_id,
            "session_id": self.request.session_id,
            "run_id": self.request.run_id,
        }


def _usage_so_far(claimed: Claimed) -> RunUsage:
    try:
        return RunUsage.model_validate_json(claimed.usage) if claimed.usage else RunUsage()
    except ValueError:  # unreadable usage must not prevent the run from ending
        return RunUsage()


def _retrieve_exceptions(tasks: set[asyncio.Task[Any]]) -> None:
    """Retrieve the exceptions of stopped tasks, so that asyncio does not log them. The latch decides how
    the run continues."""
    for task in tasks:
        if not task.cancelled():
            task.exception()


def _as_list(artifacts: Any) -> list[Any]:
    """The artifacts of the context as a list. A pattern may have assigned any object instead."""
    return list(artifacts) if isinstance(artifacts, list | tuple) else [artifacts]
