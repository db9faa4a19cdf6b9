"""Retries of a model call: the only place that decides whether a failed request is sent again, and when.

A call sends at most `llm.retry.max_attempts` requests, in all attempts of its run together. A pause of at
most `llm.retry.suspend_above_ms` is waited for inside the call. For a longer one, the run is suspended: it
uses no worker slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openagents_worker.agents import LLMRetryOptions
from openagents_worker.errors import LLMError, LLMRateLimitError
from openagents_worker.llm.base import current_call
from openagents_worker.telemetry.logs import get_logger

__all__ = ["emit_retry", "pause_ms"]

log = get_logger(__name__)


def pause_ms(
    options: LLMRetryOptions, error: LLMError, *, tries: int, spent_ms: float, random: Callable[[], float]
) -> float | None:
    """Milliseconds to wait before the next try, after `tries` requests. None: there is no next try.

    Exponential back-off with full jitter: a random share of `initial * multiplier^(tries-1)`, up to
    `max_backoff_ms`. The provider's Retry-After is the minimum of the result; it is not jittered. The result
    is None if the error is not retryable, if the provider says that a retry is useless (`is_final`), after
    `max_attempts` requests, or if the pause would end after `total_budget_ms`.
    """
    if not error.retryable or error.is_final or tries >= options.max_attempts:
        return None
    floor = error.retry_after_ms or 0 if isinstance(error, LLMRateLimitError) else 0
    growth = options.backoff_multiplier ** min(tries - 1, 64)
    pause = max(random() * min(options.max_backoff_ms, options.initial_backoff_ms * growth), floor)
    if options.total_budget_ms is not None and spent_ms + pause > options.total_budget_ms:
        return None
    return pause


def emit_retry(error: LLMError, *, model: str, delay_ms: float, attempt: int) -> None:
    """Emit `llm.retrying` to the run's events and to the log. `attempt` counts from 1."""
    call = current_call.get()
    payload: dict[str, Any] = {
        "code": error.code,
        "delay_ms": round(delay_ms),
        "attempt": attempt,
        "model": model,
        **({"request_id": error.request_id} if error.request_id else {}),
    }
    log.warning("llm.retrying", run_id=call.run_id if call else None, **payload, error=error.message)
    if call is not None and call.emit is not None:
        call.emit("llm.retrying", {**payload, "error": error.message, "call": call.call_id})
