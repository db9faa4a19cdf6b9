"""Retries: the only place that decides whether and when a run continues after a retryable error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from openagents_worker.errors import OpenAgentsError
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import RunBudget
from openagents_worker.quick_init import quick_init
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS
from openagents_worker.runtime.call_outcome import Outcome
from openagents_worker.runtime.calls_in_progress import CallsInProgress
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import FactKind, Facts
from openagents_worker.store.scripts import Claimed

__all__ = ["DEFAULT_MAX_RESUME_ATTEMPTS", "Retries", "Tries", "back_off_ms"]

DEFAULT_MAX_RESUME_ATTEMPTS = 3
FIRST_MS = 500
CAP_MS = 60_000


def back_off_ms(
    failed_before: int,
    retry_after_ms: object,
    random_unit: Callable[[], float],
    *,
    longest_ms: int = MAX_RETRY_AFTER_MS,
) -> int:
    """Milliseconds to wait: exponential back-off with equal jitter, and at least `retry_after_ms`. A
    `retry_after_ms` above `longest_ms` is shortened to it.

    `random_unit` returns a number from 0 to 1. Equal jitter (half fixed, half random) spreads simultaneous
    retries without a delay near zero:
    Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    ceiling = min(CAP_MS, FIRST_MS * 2 ** min(failed_before, 16))
    wait = ceiling / 2 + random_unit() * ceiling / 2
    return max(int(wait), min(_requested_ms(retry_after_ms), longest_ms))


def _requested_ms(retry_after_ms: object) -> int:
    """The delay that an error requests; 0 if it is not a positive number. A plugin may set any object."""
    if not isinstance(retry_after_ms, int | float) or not retry_after_ms > 0:  # also NaN
        return 0
    return int(min(retry_after_ms, MAX_RETRY_AFTER_MS))


@quick_init
@dataclass(frozen=True, slots=True)
class Tries:
    """The retries of a run so far, and how many are allowed."""

    of_call: Mapping[str, int]
    """How often each call, or part of the pattern, has failed and was retried later; by the name of its
    fact."""
    since_record: int
    """The suspensions for a retry since the last record."""
    most: int

    def failed(self, call: str) -> int:
        """How often this call, or part of the pattern, has failed and was retried later."""
        return self.of_call.get(call, 0)

    @classmethod
    def of(cls, claimed: Claimed, facts: Facts, budget: RunBudget) -> Tries:
        limit = budget.max_resume_attempts
        return cls(
            facts.counts(FactKind.TRIES),
            claimed.retries,
            DEFAULT_MAX_RESUME_ATTEMPTS if limit is None else limit,
        )


class Retries:
    """Decides whether a run is suspended to retry a failed call, or a failed part of its pattern."""

    def __init__(
        self, tries: Tries, writer: RunWriter, latch: Latch, calls: CallsInProgress, *, durable: bool
    ) -> None:
        self._tries = tries
        self._writer = writer
        self._latch = latch
        self._calls = calls
        self._durable = durable

    def should_retry(self, error: OpenAgentsError, outcome: Outcome, info: CallInfo) -> bool:
        """Whether the run is suspended to retry this call. If the retries are used up, emit an event."""
        if not error.retryable or not self._durable:
            return False
        if not outcome.may_retry:
            if getattr(error, "is_final", False):  # the requests of a model call are used up
                self._emit_exhausted(error, info.failed_tries)
            return False
        tries = self._tries
        # A prompt that differs in every attempt starts a new count each time; `since_record` limits those.
        in_flight = max(1, self._calls.unblocked())
        if info.failed_tries < tries.most and tries.since_record < tries.most * in_flight:
            return True
        self._emit_exhausted(error, info.failed_tries)
        return False

    def suspend(self, error: OpenAgentsError, part: str) -> bool:
        """Suspend the run for a retry, because a part of the pattern failed. False if that is not allowed.

        Calls in progress are cancelled, not recorded, and made again after the retry. A call that must not
        be repeated therefore forbids the retry.
        """
        if self._latch.reason is not None and not self._latch.lets_calls_end:
            return True  # the run is stopping already
        if not (error.retryable and self._durable and self._calls.may_repeat()):
            return False
        failed_tries = self._tries.failed(part)
        if failed_tries >= self._tries.most:
            self._emit_exhausted(error, failed_tries)
            return False
        self._latch.set(LatchReason.RETRY, error=error, call=part)
        self._latch.hurry()
        return True

    def _emit_exhausted(self, error: OpenAgentsError, failed_tries: int) -> None:
        self._writer.emit(
            "run.resume_exhausted",
            {
                "run_id": self._writer.run_id,
                "attempt_index": failed_tries + 1,
                "error_type": type(error).__name__,
                "error_code": error.code,
                "limit": self._tries.most,
            },
        )
