"""One attempt at a run by one worker: prepare, think, finish. The paragraph this library is about."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from openagents_worker.errors import (
    AgentNotFoundError,
    BudgetExhausted,
    ExecutionError,
    OpenAgentsError,
    OtherFormat,
    RedisUnreachable,
    RunCancelled,
)
from openagents_worker.models import ErrorDetails, RunBudget, RunRequest, RunUsage, StopReason
from openagents_worker.runtime.assembly import AgentParts, Assembly
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.deps import opened_deps
from openagents_worker.runtime.ending import Ending, checked_output, translated
from openagents_worker.runtime.journal import Record, read_pages
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.ledger import Ledger
from openagents_worker.runtime.output import DEFAULT_VALIDATION_RETRIES, fitted
from openagents_worker.runtime.prepare import Preparation, Prepared, Start
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.replay import ReplayByContent
from openagents_worker.runtime.replay_by_place import ReplayByPlace
from openagents_worker.runtime.retry import DEFAULT_MAX_RESUME_ATTEMPTS, back_off_ms
from openagents_worker.runtime.rules import REMEMBER, Rules
from openagents_worker.runtime.state import apply_changes
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.formats import BEGUN, BY_PLACE
from openagents_worker.store.runs import SessionStore
from openagents_worker.store.scripts import Claimed, Handed, Wake
from openagents_worker.telemetry import get_logger

__all__ = ["Attempt", "Carried", "Outlook"]

log = get_logger(__name__)

CANCEL_GRACE_S = (
    5.0  # a pattern that has not let go of its cancellation by then is left behind; it can write nothing
)
# Another worker knows the agent, or reads the journal: this one is older, the run waits for that one.
LEAVE_MS = 5_000
PREPARING = "prepare"  # the part of a run before its pattern, where calls are found by place
OPEN = "deps"  # as a call that is tried again; no call of a pattern has such a key


class Outlook(StrEnum):
    """What became of a run in this process."""

    ENDED = "ended"
    SUSPENDED = "suspended"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Carried:
    """The outcome of carrying a run. `reason` is the claim's answer, a retry's error code, or `handover`.

    `life` is which of the run's lives has ended.
    """

    kind: Outlook
    reason: str = ""
    stop_reason: StopReason | None = None
    delay_ms: int | None = None
    error: ErrorDetails | None = None
    life: int = 1


class Attempt:
    """A claimed run in the hands of this process."""

    def __init__(
        self,
        claimed: Claimed,
        *,
        store: AsyncStore,
        lease: Lease,
        assembly: Assembly,
        settings: Settings,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        chance: Callable[[], float] = random.random,
    ) -> None:
        request = RunRequest.model_validate_json(claimed.request)
        self._budget = (request.budget or RunBudget()).within(assembly.limits(request.agent_id))
        self.request = request.model_copy(update={"budget": self._budget})
        self.latch = Latch()
        self._claimed = claimed
        self._store = store
        self._lease = lease
        self._assembly = assembly
        self._settings = settings
        self._send_wakes = send_wakes
        self._chance = chance
        self._started = time.monotonic()
        self._durable = claimed.durable
        self._ledger = Ledger(
            store=store,
            lease=lease,
            run_id=self.request.run_id,
            fence=claimed.fence,
            attempt=claimed.attempt,
            latch=self.latch,
            ids=self._ids,
            preview_chars=settings.event_preview_chars,
            redact_keys=assembly.redact_keys,
        )
        self._sessions = SessionStore(self._ledger)
        self._recorder: Recorder | None = None
        self._context: RunContext | None = None
        self._state_before: dict[str, str] = {}

    async def carry(self) -> Carried:
        """Prepare, think, finish; or stop where the latch says so."""
        try:
            ending = await self._to_the_end()
            if ending is None:
                return await self._let_go()
            return await self._finish(ending)
        except RunLatched:
            return await self._let_go()
        finally:
            await self._ledger.close()
            self._forget()

    def _forget(self) -> None:
        """Break the circles in which the parts of a run hold each other: its memory is free at once."""
        if self._context is not None:
            self._context.tools = {}
        self._context = self._recorder = None

    async def _to_the_end(self) -> Ending | None:
        """The run's ending, or None when it was latched on the way."""
        parts: AgentParts | None = None
        try:
            parts = self._assembly.parts(self.request.agent_id)
            recorded, start = await self._read_journal(parts)
            self._tell_beginning(recorded)
            async with AsyncExitStack() as opened:
                deps = await self._open_deps(opened)
                output = await self._supervised(self._work(parts, recorded, start, deps))
                output = checked_output(output, self._settings.max_payload_bytes)
        except AgentNotFoundError as error:
            if await self._others_know_the_agent():
                self.latch.set(LatchReason.RETRY, error=error)
                return None
            return self._ending(error=error)
        except OtherFormat as error:  # seldom: a claim has looked at the record, which tells what is needed
            self.latch.set(LatchReason.RETRY, error=error)
            return None
        except Exception as error:  # noqa: BLE001  # whatever a pattern raises is this run's failure, not the worker's
            return None if self.latch.reason else self._ending(error=self._verdict() or translated(error))
        finally:
            if parts is not None:
                await parts.aclose()
        return None if self.latch.reason else self._ending(output=output)

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
            self.latch.set(LatchReason.RETRY, error=error, call=OPEN)
            raise RunLatched(LatchReason.RETRY) from error

    async def _read_journal(self, parts: AgentParts) -> tuple[Record | None, Start]:
        """Read what earlier attempts have recorded. Checkpoint 0, and where the run starts in its session."""
        pages = read_pages(self._ledger.journal_page, self._claimed.journal, self._claimed.journal_length)
        records = [Record.from_json(text, n) async for n, text in _numbered(pages)]
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
            rules=self._rules(recorded, records),
            position=self._claimed.journal_length,
            ledger=self._ledger,
            latch=self.latch,
            retries=self._claimed.retries,
            max_tries=self._max_tries,
            life=self._claimed.life,
            durable=self._durable,
            max_record_bytes=self._settings.max_payload_bytes,
            definition_changed=start.definition_hash != here.definition_hash,
            transcript_length=start.transcript_length,
            on_record=self._apply,
        )
        return recorded, start

    def _rules(self, recorded: Record | None, records: list[Record]) -> Rules:
        """A run goes on under the rules under which it was begun; checkpoint 0 says which."""
        format_ = recorded.v if recorded is not None else BEGUN
        kind = ReplayByPlace if format_ == BY_PLACE else ReplayByContent
        rules = kind(records, life=self._claimed.life, latch=self.latch, tries=self._tries)
        self._ledger.format = rules.format
        return rules

    async def _work(self, parts: AgentParts, recorded: Record | None, start: Start, deps: Any) -> Any:
        """All that is done for a run, in one task: prepare, think, remember. Its output."""
        recorder = self._recorder
        assert recorder is not None
        recorder.begin(PREPARING if recorder.rules.format == BY_PLACE else "")
        try:
            prepared = await self._prepare(parts, recorded, start, deps)
            if recorder.rules.format == BY_PLACE:
                recorder.begin()
            output = await self._execute(prepared)
            if recorder.verdict is not None:
                raise recorder.verdict
            await recorder.check_all_read()
            recorder.begin(REMEMBER)
            await prepared.memory.remember(output)
            await recorder.check_all_read(REMEMBER)
            return output
        finally:
            recorder.end()

    async def _prepare(self, parts: AgentParts, recorded: Record | None, start: Start, deps: Any) -> Prepared:
        recorder = self._recorder
        assert recorder is not None
        state = {key: json.loads(text) for key, text in self._state_before.items()}
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
        return {key.removeprefix("tries:"): int(n) for key, n in facts.items() if key.startswith("tries:")}

    @property
    def _max_tries(self) -> int:
        limit = self._budget.max_resume_attempts
        return DEFAULT_MAX_RESUME_ATTEMPTS if limit is None else limit

    def _apply(self, record: Record) -> None:
        """A recorded call returns: its changes become the run's."""
        assert self._context is not None
        apply_changes(self._context.state, record.state)
        for artifact in record.artifacts:
            self._context.add_artifact(**artifact)

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

    async def _others_know_the_agent(self) -> bool:
        key = self._ledger.keys("agents")
        return bool(await self._ledger.ask(lambda r: r.hexists(key, self.request.agent_id)))

    # --- think -------------------------------------------------------------------------------------------

    async def _supervised(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The run's output, or the error it ends with; returns at once when the run is latched."""
        thinking = outside_runs(work, name=f"run {self.request.run_id}")
        try:
            await asyncio.wait(
                {thinking, self.latch.is_set},
                timeout=self._time_left_s(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if thinking.done() and self.latch.reason is None:
                return self._output_of(thinking)
            over = None if self.latch.reason else self._duration_exhausted()
            await self._stop_thinking(thinking)
            if over is not None and self.latch.reason is None:
                raise over
            raise RunLatched(self.latch.reason or LatchReason.HANDOVER)
        except (
            asyncio.CancelledError
        ):  # whoever carries us stops: the run stays ours until the heartbeat releases it
            self.latch.set(LatchReason.FENCED, detail="abandoned")
            await self._stop_thinking(thinking)
            raise

    async def _execute(self, prepared: Prepared) -> Any:
        """The pattern's output, of the type that was asked for."""
        output = await prepared.pattern.execute()
        if prepared.output_type is None:
            return output
        limit = self._budget.max_validation_retries
        attempts = 1 + (DEFAULT_VALIDATION_RETRIES if limit is None else limit)
        attempts *= self._claimed.life  # those of earlier lives are in the journal
        return await fitted(output, prepared.output_type, prepared.pattern, prepared.context, attempts)

    def _output_of(self, thinking: asyncio.Task[Any]) -> Any:
        recorder = self._recorder
        assert recorder is not None
        if thinking.cancelled():
            raise ExecutionError("the pattern cancelled itself")
        error = thinking.exception()
        if recorder.verdict is not None:
            raise recorder.verdict from (
                error if isinstance(error, Exception) and error is not recorder.verdict else None
            )
        if error is not None:
            raise error
        return thinking.result()

    async def _stop_thinking(self, thinking: asyncio.Task[Any]) -> None:
        """End the pattern. Calls that may end do so first and are recorded; others are cancelled."""
        recorder = self._recorder
        assert recorder is not None
        if self.latch.reason is not None and self.latch.lets_calls_end:
            quiet = asyncio.create_task(recorder.quiet(), name=f"quiet {self.request.run_id}")
            stop_now = asyncio.create_task(self.latch.wait_stop_now(), name=f"stop {self.request.run_id}")
            await asyncio.wait({quiet, stop_now}, return_when=asyncio.FIRST_COMPLETED)
            quiet.cancel()
            stop_now.cancel()
        for _ in range(3):  # a pattern may swallow a cancellation once
            recorder.stop()
            thinking.cancel()
            await asyncio.wait({thinking}, timeout=CANCEL_GRACE_S / 3)
            if thinking.done():
                break
        else:
            log.warning("run.does_not_stop", run_id=self.request.run_id, reason=str(self.latch.reason))
        if thinking.done() and not thinking.cancelled():
            thinking.exception()  # seen; the latch says how the run goes on

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

    def _verdict(self) -> OpenAgentsError | None:
        return self._recorder.verdict if self._recorder else None

    # --- finish ------------------------------------------------------------------------------------------

    def _ending(self, *, output: Any = None, error: OpenAgentsError | None = None) -> Ending:
        if error is not None:
            error.run_id = error.run_id or self.request.run_id
        return Ending(
            request=self.request,
            usage=self._recorder.usage if self._recorder else _usage_so_far(self._claimed),
            artifacts=list(self._context.artifacts) if self._context else [],
            duration_ms=self._active_ms,
            output=output,
            error=error,
            redact_keys=self._assembly.redact_keys,
        )

    async def _finish(self, ending: Ending) -> Carried:
        before = self._state_before if self._context else {}
        state = self._context.state if self._context else {}
        try:
            arguments = ending.arguments(before, state)
        except (TypeError, ValueError) as error:  # the state holds what is not JSON: the run has no valid end
            ending = self._ending(error=translated(error))
            arguments = ending.arguments(before, state)
        handed = await self._ledger.finish(**arguments)
        await self._send(handed)
        log.info(
            "run.ended",
            run_id=self.request.run_id,
            stop_reason=str(ending.stop_reason),
            attempt=self._claimed.attempt,
        )
        return Carried(
            Outlook.ENDED, stop_reason=ending.stop_reason, error=ending.details, life=self._claimed.life
        )

    async def _let_go(self) -> Carried:
        """The run goes on elsewhere, later, or not at all."""
        try:
            match self.latch.reason:
                case LatchReason.RETRY:
                    return await self._retry_later()
                case LatchReason.HANDOVER:
                    handed = await self._ledger.suspend(kind="handover", delay_ms=0, call="", error_code="")
                    if self.latch.reason is LatchReason.HANDOVER:
                        await self._send(handed)
                        return Carried(Outlook.SUSPENDED, "handover")
                case LatchReason.FENCED | LatchReason.CANCELLED | None:
                    pass
            if self.latch.reason is LatchReason.CANCELLED:
                return await self._finish(self._ending(error=RunCancelled(await self._why_cancelled())))
        except RunLatched:
            pass
        log.warning(
            "run.fenced", run_id=self.request.run_id, attempt=self._claimed.attempt, detail=self.latch.detail
        )
        return Carried(Outlook.NOTHING, "fenced")

    async def _why_cancelled(self) -> str:
        """The reason that was given; it stands in the record, as a notice is an id only."""
        key = self._store.keys("run", self.request.run_id)
        try:
            reason = await self._store.ask(lambda r: r.hget(key, "cancel_reason"))
        except RedisUnreachable:  # the end is written with more patience than a reason is asked for
            reason = None
        return str(reason or "cancelled")

    async def _retry_later(self) -> Carried:
        error = self.latch.error
        assert error is not None
        if isinstance(error, AgentNotFoundError | OtherFormat):
            delay_ms = LEAVE_MS
        else:
            delay_ms = back_off_ms(
                self._tries.get(self.latch.call, 0), getattr(error, "retry_after_ms", None), self._chance
            )
        handed = await self._ledger.suspend(
            kind="retry", delay_ms=delay_ms, call=self.latch.call, error_code=error.code
        )
        if self.latch.reason is LatchReason.CANCELLED:
            return await self._finish(self._ending(error=RunCancelled(await self._why_cancelled())))
        await self._send(handed)
        return Carried(
            Outlook.SUSPENDED, error.code, delay_ms=delay_ms, error=ErrorDetails.from_exception(error)
        )

    async def _send(self, handed: Handed) -> None:
        if handed.wakes:
            await self._send_wakes(handed.wakes)

    def note(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event of whoever watches over the run from outside; stored with the run's next ones."""
        self._ledger.note(name, payload)

    def _note(self, name: str, **payload: Any) -> None:
        self._ledger.note_of_run(name, **payload)

    @property
    def _ids(self) -> dict[str, str]:
        return {
            "agent_id": self.request.agent_id,
            "session_id": self.request.session_id,
            "run_id": self.request.run_id,
        }


def _usage_so_far(claimed: Claimed) -> RunUsage:
    return RunUsage.model_validate_json(claimed.usage) if claimed.usage else RunUsage()


async def _numbered(texts: AsyncIterator[str]) -> AsyncIterator[tuple[int, str]]:
    number = 0
    async for text in texts:
        yield number, text
        number += 1
