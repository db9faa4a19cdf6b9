"""Limits of steps: the only place that bounds the number of the steps of a run, and the time of each."""

from __future__ import annotations

import asyncio
from types import TracebackType

from openagents_worker.errors import MaxStepsExceeded, StepTimeoutError
from openagents_worker.patterns.base import RunContext

__all__ = ["more_steps", "step_deadline", "step_limit"]


def step_limit(context: RunContext, configured: int) -> int:
    """The largest number of steps of the run: the configured one, or the request's budget if it is lower."""
    budget = getattr(context.run_request, "budget", None)
    allowed: int | None = getattr(budget, "max_steps", None)
    return configured if allowed is None else min(configured, allowed)


async def more_steps(context: RunContext, limit: int) -> int:
    """The number of steps that the run may make now, after `limit` steps: somebody has extended its budget.

    Raises `MaxStepsExceeded`. With `on_breach: pause`, the run waits here.
    """
    exceeded = MaxStepsExceeded(
        f"Pattern exceeded max_steps ({limit})", kind="steps", current=limit, limit=limit
    )
    ask = getattr(context, "more_steps", None)
    if ask is None:
        raise exceeded
    extended: int = await ask(limit, exceeded)
    return extended


class step_deadline:
    """End a step after `limit_ms` milliseconds with `StepTimeoutError`. Other TimeoutErrors are unchanged.

    If the runtime can retry the step later, it suspends the run here, and the pattern gets no error.
    """

    __slots__ = ("_context", "_deadline", "_error", "_limit_ms", "_loop", "_step", "_timer")

    def __init__(self, context: RunContext, step: int, limit_ms: int | None) -> None:
        self._context = context
        self._step = step
        self._limit_ms = limit_ms
        self._error: StepTimeoutError | None = None

    async def __aenter__(self) -> None:
        if self._limit_ms is None:
            return
        self._loop = asyncio.get_running_loop()
        # Not asyncio.wait_for: it would run the step in another task, which changes the place of its calls.
        self._deadline = asyncio.timeout(None)
        await self._deadline.__aenter__()
        self._timer = self._loop.call_later(self._limit_ms / 1000, self._on_timeout)

    def _on_timeout(self) -> None:
        self._error = StepTimeoutError(
            f"Pattern step timed out after {self._limit_ms}ms at step {self._step}", step_number=self._step
        )
        suspend_for_retry = getattr(self._context, "suspend_for_retry", None)
        if suspend_for_retry is None or not suspend_for_retry(self._error, f"step {self._step}"):
            self._deadline.reschedule(self._loop.time())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._limit_ms is None:
            return
        self._timer.cancel()
        try:
            await self._deadline.__aexit__(kind, error, trace)
        except TimeoutError as timeout:  # the deadline has cancelled the block
            error = timeout
        if self._error is not None and self._deadline.expired() and isinstance(error, TimeoutError):
            raise self._error from None
