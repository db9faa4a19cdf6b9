"""Retries inside one model call: the only place that decides whether a failed request is sent again at once.

An error that is not retried here reaches the run. The run is then suspended and uses no worker slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openagents_worker.agents import LLMRetryOptions
from openagents_worker.errors import LLMError, LLMRateLimitError
from openagents_worker.llm.base import current_call
from openagents_worker.telemetry.logs import get_logger

__all__ = ["pause_ms", "emit_retry"]

log = get_logger(__name__)


def pause_ms(
    options: LLMRetryOptions, error: LLMError, *, tries: int, spent_ms: float, random: Callable[[], float]
) -> float | None:
    """Milliseconds to wait before the next try. None: do not retry here, raise the error to the run.

    Exponential back-off with full jitter: a random share of `initial * multiplier^(tries-1)`, up to
    `max_backoff_ms`. The provider's Retry-After is the minimum of the result; it is not jittered. The result
    is None if that minimum is more than twice `max_backoff_ms`, or if the pause would end after
    `total_budget_ms`.
    """
    if not error.retryable or tries >= options.max_attempts:
        return None
    floor = error.retry_after_ms or 0 if isinstance(error, LLMRateLimitError) else 0
    if floor > 2 * options.max_backoff_ms:
        return None
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
    }
    log.warning("llm.retrying", run_id=call.run_id if call else None, **payload, error=error.message)
    if call is not None and call.emit is not None:
        call.emit("llm.retrying", {**payload, "error": error.message, "call": call.call_id})
