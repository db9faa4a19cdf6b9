"""One attempt at a run by one worker: prepare, think, finish. The paragraph this library is about."""

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
from openagents_worker.runtime.output import DEFAULT_VALIDATION_RETRIES, fitted
from openagents_worker.runtime.parting import AttemptOutcome, AttemptResult, Parting
from openagents_worker.runtime.prepare import Preparation, Prepared, Start
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
from openagents_worker.store.formats import BEGUN, BY_PLACE, WRITTEN, translate_parse_errors
from openagents_worker.store.records import SessionStore
from openagents_worker.store.scripts import Claimed, Wake, WriteResult
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.telemetry.sentry import report_unless_logged
from openagents_worker.tools.offload import work_off_loop

__all__ = ["EX_DOES_NOT_STOP", "Attempt", "AttemptResult", "AttemptOutcome"]

log = get_logger(__name__)

EX_DOES_NOT_STOP = 70  # EX_SOFTWARE of sysexits.h
PREPARING = "prepare"  # the part of a run before its pattern, where calls are found by place
MAX_TRIES_DIGITS = 10  # of a count: a longer one is not ours
OPEN = "deps"  # as a call that is tried again; no call of a pattern has such a key


class Attempt:
    """A claimed run in the hands of this process."""

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
        chance: Callable[[], float] = random.random,
        leave: Callable[[int], object] = os._exit,
        marks: Marks | None = None,
        unreadable: OpenAgentsError | None = None,
    ) -> None:
        """`leave` ends the process, with this exit code, when code of the run cannot be stopped.

        In `marks` stands what of the run executes. `unreadable` says why there is no request but the ids of
        one: the run ends, or is left to others.
        """
        self._budget = (request.budget or RunBudget()).within(assembly.limits(request.agent_id))
        self.request = request.model_copy(update={"budget": self._budget})
        self.latch = Latch()
        self._claimed = claimed
        self._unreadable = unreadable
        self._store = store
        self._lease = lease
        self._assembly = assembly
        self._settings = settings
        self._send_wakes = send_wakes
        self._chance = chance
        self._leave = leave
        self._limits = settings.time_limits
        self._started = time.monotonic()
        self._durable = claimed.durable
        self._ledger = RunWriter(
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
        self._sessions = SessionStore(self._ledger)
        self._recorder: Recorder | None = None
        self._context: RunContext | None = None
        self._state_before: dict[str, str] = {}
        self._turn_messages: Any = ()
        self._code = RunCode(self.request.run_id, self.request.agent_id, self.latch, marks, lease.incarnation)
        self.is_abandoned = False
        """Whether whoever carries the run has stopped carrying it, while it was still this worker's."""

    async def execute(self) -> AttemptResult:
        """Prepare, think, finish; or stop where the latch says so."""
        try:
            ending = await self._worked()
            return await (self._parting.leave() if ending is None else self._finish(ending))
        except RunLatched:
            return await self._parting.leave()
        finally:
            self.latch.set(LatchReason.FENCED, detail="the attempt has ended")  # no call starts after this
            await self._ledger.close()
            self._forget()

    def interrupt(self, by: BaseException) -> None:
        """Whoever carries the run is told to stop: by a cancellation, or by Celery's soft time limit."""
        if isinstance(by, Exception):
            error = PatternError(described(by), hint="the run met a time limit of its Celery task")
            error.__cause__ = by
            self.latch.set(LatchReason.TIME_LIMIT, error=error)
        else:
            self.is_abandoned = self.is_abandoned or self.latch.reason is not LatchReason.FENCED
            self.latch.set(LatchReason.FENCED, detail="abandoned")

    @property
    def mark(self) -> bytes:
        """What whoever executes the attempt has as its mark."""
        return self._code.mark()

    def what_runs(self) -> dict[str, Any]:
        """What of the run still executes, for the log."""
        return {
            "run_id": self.request.run_id,
            "agent_id": self.request.agent_id,
            "in_threads": self._code.off_loop.names(),
            "tasks": sorted(task.get_name() for task in self._code.tasks()),
        }

    def _forget(self) -> None:
        """Break the circles in which the parts of a run hold each other: its memory is free at once."""
        if self._context is not None:
            self._context.tools = {}
        self._context = self._recorder = None

    # --- work --------------------------------------------------------------------------------------------

    async def _worked(self) -> Ending | None:
        """The run's ending; None when it was latched on the way, and then none of its code runs any more."""
        context = copy_context()
        context.run(current_run.set, self._code)
        context.run(marked.set, self.mark)
        context.run(work_off_loop.set, self._code.off_loop)
        working = asyncio.create_task(self._work(), name=f"run {self.request.run_id}", context=context)
        either: set[asyncio.Future[Any]] = {working, self.latch.is_set}
        try:
            await asyncio.wait(either, timeout=self._time_left_s(), return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and self.latch.reason is None:
                self.latch.set(LatchReason.TIME_LIMIT, error=self._duration_exhausted())
        except asyncio.CancelledError:  # the loop ends: the run stays ours until others take it
            self.latch.set(LatchReason.FENCED, detail="abandoned")
            await self._stop(working)
            raise
        if self.latch.reason is not None:
            await self._stop(working)
            return None
        if working.cancelled():
            return self._ending(error=ExecutionError("the pattern cancelled itself"))
        # It has outwitted `user_code`, by a future that closes its coroutine for example.
        if (error := working.exception()) is not None:
            return self._ending(error=self._verdict(coded(error, PatternError)))
        return working.result()

    async def _work(self) -> Ending | None:
        """From the run's parts to its ending, which also an error is; None when it was latched."""
        if self._unreadable is not None:
            return self._without_a_request(self._unreadable)
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
                return await self._without_the_agent(error)
            return self._ending(error=error)
        try:
            with user_code(PatternError):
                return self._ending(output=await self._output(parts))
        except RunLatched:
            return None
        except OpenAgentsError as error:
            return self._ending(error=self._verdict(error))
        finally:
            await self._close(parts)

    async def _output(self, parts: AgentParts) -> Any:
        """The run's output. Whatever is asked of others on the way goes through the recorder."""
        recorded, start = await self._read_journal(parts)
        self._tell_beginning(recorded)
        recorder = self._recorder
        assert recorder is not None
        async with AsyncExitStack() as opened:
            deps = await self._open_deps(opened)
            recorder.begin(PREPARING if recorder.rules.format == BY_PLACE else "")
            try:
                prepared = await self._prepare(parts, recorded, start, deps)
                if recorder.rules.format == BY_PLACE:
                    recorder.begin()
                output = await self._execute(prepared)
                recorder.begin(REMEMBER)
                await prepared.memory.remember(output)
                await self._check_all_read(REMEMBER)
            finally:
                recorder.end()
            return checked_output(output, self._settings.max_payload_bytes)

    def _without_a_request(self, error: OpenAgentsError) -> Ending | None:
        """The run ends here, unless another version can read what this one cannot."""
        if isinstance(error, OtherFormat):
            self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
            return None
        return self._ending(error=error)

    async def _without_the_agent(self, error: AgentNotFoundError) -> Ending | None:
        """The agent is not known here: the run waits for a worker that has announced it, where one has."""
        key = self._ledger.keys("agents")
        if not await self._ledger.ask(lambda r: r.hexists(key, self.request.agent_id)):
            return self._ending(error=error)
        self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
        return None

    async def _close(self, parts: AgentParts) -> None:
        """Close the plugins of this attempt; what they raise then comes too late to change how it ends."""
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

    async def _open_deps(self, opened: AsyncExitStack) -> Any:
        """What tools get as `context.deps`; a deployment that cannot make it now is asked again later."""
        try:
            return await opened.enter_async_context(
                opened_deps(self.request.deps, self._assembly.offload.in_thread)
            )
        except OpenAgentsError as error:
            if not (error.retryable and self._durable and self._tries.get(OPEN, 0) < self._max_tries):
                raise
            log.warning(
                "deps.unavailable", **self._ids, **described_in_log(error), user_error=user_error_of(error)
            )
            self.latch.set(LatchReason.RETRY, error=error, call=OPEN)
            raise RunLatched(LatchReason.RETRY) from error

    async def _read_journal(self, parts: AgentParts) -> tuple[Record | None, Start]:
        """Read what earlier attempts have recorded. Checkpoint 0, and where the run starts in its session."""
        records = await self._records()
        recorded = records.pop(0) if records else None
        here = Start(self._claimed.messages, self._claimed.artifacts, parts.definition_hash)
        start = Start.of(recorded) if recorded else here
        state_before = self._claimed.session_state
        if state_before is None:
            state_before = await self._sessions.load_state_texts(self.request.session_id)
        self._state_before = state_before
        self._recorder = Recorder(
            run_id=self.request.run_id,
            uid=self._claimed.uid,
            rules=self._rules(recorded, [record for record in records if record.kind != CHECK]),
            position=self._claimed.journal_length,
            ledger=self._ledger,
            latch=self.latch,
            retries=self._claimed.retries,
            tries=self._tries,
            max_tries=self._max_tries,
            life=self._claimed.life,
            durable=self._durable,
            max_record_bytes=self._settings.max_payload_bytes,
            definition_changed=start.definition_hash != here.definition_hash,
            transcript_length=start.transcript_length,
            on_record=self._apply,
            checks=checks_of(records, self._claimed.life),
        )
        return recorded, start

    async def _records(self) -> list[Record]:
        pages = read_pages(self._ledger.journal_page, self._claimed.journal, self._claimed.journal_length)
        records: list[Record] = []
        async for text in pages:
            try:
                records.append(Record.from_json(text, len(records)))
            except OtherFormat as error:
                # Seldom: a claim has looked at the record of the run, which says what format is needed.
                self.latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
                raise RunLatched(LatchReason.LEFT_TO_OTHERS) from error
        return records

    def _rules(self, recorded: Record | None, records: list[Record]) -> Rules:
        """A run goes on under the rules under which it was begun; checkpoint 0 says which."""
        format_ = recorded.v if recorded is not None else BEGUN
        kind = ReplayByPlace if format_ == BY_PLACE else ReplayByContent
        rules = kind(records, life=self._claimed.life, latch=self.latch, tries=self._tries)
        self._ledger.format = rules.format
        return rules

    async def _prepare(self, parts: AgentParts, recorded: Record | None, start: Start, deps: Any) -> Prepared:
        recorder = self._recorder
        assert recorder is not None
        with translate_parse_errors(WRITTEN, session_id=self.request.session_id):
            state = {key: loads(text) for key, text in self._state_before.items()}
        self._context = RunContext(self.request, state, recorder, parts.definition.llm, deps=deps)
        if recorded is None and self._durable:
            recorder.begin_journal(start.to_record(recorder.rules.format))
        prepared = await Preparation(
            context=self._context,
            parts=parts,
            sessions=self._sessions,
            recorder=recorder,
            ledger=self._ledger,
            budget=self._budget,
            recorded=recorded,
            start=start,
        ).run()
        recorder.start_is_prepared()
        if self._claimed.retries:
            self._note(
                "run.resume_succeeded", checkpoint_id=self._checkpoint_id, attempt_index=self._claimed.retries
            )
        return prepared

    @property
    def _tries(self) -> dict[str, int]:
        """How often each call has failed so far and was put off."""
        facts = self._claimed.facts or {}
        tries = {key.removeprefix("tries:"): n for key, n in facts.items() if key.startswith("tries:")}
        return {call: int(n) for call, n in tries.items() if n.isdecimal() and len(n) < MAX_TRIES_DIGITS}

    @property
    def _max_tries(self) -> int:
        limit = self._budget.max_resume_attempts
        return DEFAULT_MAX_RESUME_ATTEMPTS if limit is None else limit

    def _apply(self, record: Record) -> None:
        """A recorded call returns: its changes become the run's."""
        assert self._context is not None
        apply_changes(self._context.state, record.state)
        for artifact in record.artifacts:
            self._context.artifacts.append(RunArtifact.model_validate(artifact))

    def _tell_beginning(self, recorded: Record | None) -> None:
        if self._claimed.retries:
            self._note(
                "run.resume_attempted",
                checkpoint_id=self._checkpoint_id,
                error_type=self._claimed.last_error,
                error_code=self._claimed.last_error,
                attempt_index=self._claimed.retries,
            )
        if recorded is not None:
            return
        if self._claimed.attempt == 1:
            self._note("run.requested", input_text=self.request.input_text)
            self._note("session.run.started", input_text=self.request.input_text)
            self._note("run.validated")
        self._note("session.acquired")

    @property
    def _checkpoint_id(self) -> str | None:
        length = self._claimed.journal_length
        return f"{self.request.run_id}:step:{length - 1}" if length else None

    # --- think -------------------------------------------------------------------------------------------

    async def _execute(self, prepared: Prepared) -> Any:
        """The pattern's output, of the type that was asked for."""
        recorder = self._recorder
        assert recorder is not None
        with executing("pattern", class_path(prepared.pattern)):
            output = await prepared.pattern.execute()
        if prepared.output_type is not None:
            limit = self._budget.max_validation_retries
            attempts = 1 + (DEFAULT_VALIDATION_RETRIES if limit is None else limit)
            attempts *= self._claimed.life  # those of earlier lives are in the journal
            with executing("output_type", prepared.output_type.name):
                output = await fitted(
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
        await self._check_all_read()
        return output

    async def _check_all_read(self, part: str = "") -> None:
        """A part of the run has come to its end; whatever the pattern made of it, these go before."""
        recorder = self._recorder
        assert recorder is not None
        if self.latch.reason is None and recorder.verdict is None:
            await recorder.check_all_read(part)
        if self.latch.reason is not None:
            raise RunLatched(self.latch.reason)
        if recorder.verdict is not None:
            raise recorder.verdict

    def _verdict(self, error: OpenAgentsError) -> OpenAgentsError:
        """The error that ends the run: that of the recorder where it has one, whatever came of it."""
        verdict = self._recorder.verdict if self._recorder else None
        if verdict is None or verdict is error:
            return error
        if verdict.__cause__ is None and error.__cause__ is not verdict:
            verdict.__cause__ = error
        return verdict

    async def _stop(self, working: asyncio.Task[Any]) -> None:
        """End all code of the run. Calls that may end do so first and are recorded; others are cancelled.

        Where it cannot be stopped the process ends: the session must not go on beside it.
        """
        recorder = self._recorder
        if recorder is not None and self.latch.lets_calls_end:
            quiet = asyncio.create_task(recorder.quiet(), name=f"quiet {self.request.run_id}")
            stop_now = asyncio.create_task(self.latch.wait_stop_now(), name=f"stop {self.request.run_id}")
            await asyncio.wait({quiet, stop_now}, return_when=asyncio.FIRST_COMPLETED)
            quiet.cancel()
            stop_now.cancel()
        began = time.monotonic()
        while self._runs(working):
            left_s = self._grace_s - (time.monotonic() - began)
            if left_s <= 0:
                self._leave_what_does_not_stop()
                return
            if recorder is not None:
                recorder.stop()
            tasks = self._tasks(working)
            for task in tasks:
                task.cancel()
            pause_s = min(left_s, self._limits.cancel_grace_s / 3)  # a pattern may swallow a cancellation
            if tasks:
                done, _ = await asyncio.wait(tasks, timeout=pause_s)
                _seen(done)
            else:
                await self._code.off_loop.wait(pause_s)
        _seen({working})

    def _runs(self, working: asyncio.Task[Any]) -> bool:
        """Whether code of the run executes that has to have stopped.

        A run that is tried again keeps its session: a call whose time was over may go on in its thread.
        """
        waits_for_threads = self.latch.reason is not LatchReason.RETRY
        return bool(self._tasks(working) or (waits_for_threads and self._code.off_loop.names()))

    def _tasks(self, working: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
        return {task for task in self._code.tasks() | {working} if not task.done()}

    @property
    def _grace_s(self) -> float:
        """How long code of the run may go on once it is stopped: where others may have the run, less long."""
        grace_s = self._settings.stop_grace_s
        if self.latch.reason is LatchReason.FENCED:
            return min(self._limits.cancel_grace_s, grace_s)
        return grace_s

    def _leave_what_does_not_stop(self) -> None:
        log.error(
            "run.does_not_stop",
            reason=str(self.latch.reason),
            after_s=self._grace_s,
            exit_code=EX_DOES_NOT_STOP,
            **self.what_runs(),
        )
        line_groups.flush()
        self._leave(EX_DOES_NOT_STOP)
        self.latch.set(LatchReason.FENCED, detail="its code does not stop")  # where nobody has left

    def _time_left_s(self) -> float | None:
        """Seconds of `max_duration_ms` that are left. Waiting, retrying and parked time is not counted."""
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
        if error is not None:
            error.run_id = error.run_id or self.request.run_id
        return Ending(
            request=self.request,
            usage=self._recorder.usage if self._recorder else _usage_so_far(self._claimed),
            artifacts=_listed(self._context.artifacts) if self._context else [],
            duration_ms=self._active_ms,
            output=output,
            error=error,
            turn_messages=self._turn_messages,
            redact_keys=self._assembly.redact_keys,
        )

    async def _finish(self, ending: Ending) -> AttemptResult:
        """Write the run's end; one that can be stored where this one cannot."""
        stored = ending.stored(
            self._state_before if self._context else {}, self._context.state if self._context else {}
        )
        try:
            handed = await self._ledger.finish(**stored.arguments)
        except Exception as error:
            # It cannot be sent as it is: half of a character has got past the checks, for example.
            log.exception("run.end_not_stored", run_id=self.request.run_id)
            stored = ending.bare(f"the run's end cannot be stored: {described(error)}")
            handed = await self._ledger.finish(**stored.arguments)
        await self._send(handed)
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
        """One line; of a run that failed an error's, with the traceback of what is not this library's."""
        said: dict[str, Any] = {
            **self._ids,
            "stop_reason": str(ending.stop_reason),
            "attempts": self._claimed.attempt,
        }
        if ending.error is None or ending.state == "cancelled":
            log.info("run.ended", **said)
            return
        raised = user_error_of(ending.error)
        log.error("run.failed", **said, **described_in_log(ending.error), user_error=raised)
        report_unless_logged(raised)

    @property
    def _parting(self) -> Parting:
        return Parting(
            self.latch,
            self._ledger,
            finish=lambda error: self._finish(self._ending(error=error)),
            send=self._send,
            back_off_ms=lambda error, call: back_off_ms(
                self._tries.get(call, 0), getattr(error, "retry_after_ms", None), self._chance
            ),
            why_cancelled=self._why_cancelled,
            left_max_ms=round(self._settings.left_to_others_max_s * 1000),
        )

    async def _why_cancelled(self) -> str:
        """The reason that was given; it stands in the record, as a notice is an id only."""
        key = self._store.keys("run", self.request.run_id)
        try:
            reason = await self._store.ask(lambda r: r.hget(key, "cancel_reason"))
        except RedisUnreachable:  # the end is written with more patience than a reason is asked for
            reason = None
        return str(reason or "cancelled")

    async def _send(self, handed: WriteResult) -> None:
        if handed.wakes:
            await self._send_wakes(handed.wakes)

    def note(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event of whoever watches over the run from outside; stored with the run's next ones."""
        self._ledger.note(name, payload)

    def _note(self, name: str, **payload: Any) -> None:
        self._ledger.emit_run_event(name, **payload)

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
    except ValueError:  # what cannot be read does not keep the run from ending
        return RunUsage()


def _seen(tasks: set[asyncio.Task[Any]]) -> None:
    """What these tasks raised when they were stopped concerns nobody: the latch says how the run goes on."""
    for task in tasks:
        if not task.cancelled():
            task.exception()


def _listed(artifacts: Any) -> list[Any]:
    """The context's artifacts; a pattern may have put anything in the list's place."""
    return list(artifacts) if isinstance(artifacts, list | tuple) else [artifacts]
