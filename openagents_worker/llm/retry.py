"""Retries at the boundary: the only place that decides whether a failed request is sent again at once.

What is not repeated here reaches the run, which suspends and holds no worker while it waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openagents_worker.agents import LLMRetryOptions
from openagents_worker.errors import LLMError, LLMRateLimitError
from openagents_worker.llm.base import current_call
from openagents_worker.telemetry.logs import get_logger

__all__ = ["pause_ms", "tell_retry"]

log = get_logger(__name__)


def pause_ms(
    options: LLMRetryOptions, error: LLMError, *, tries: int, spent_ms: float, random: Callable[[], float]
) -> float | None:
    """Milliseconds to wait before the next try, or None: leave it to the run.

    Exponential back-off with full jitter: a random share of `initial * multiplier^(tries-1)`, capped. The
    time the provider asked for is a floor under the result, not an input of the jitter. A floor of more than
    twice the cap, or a pause that ends after the total budget, is not waited for.
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


def tell_retry(error: LLMError, *, model: str, delay_ms: float, attempt: int) -> None:
    """Tell the run's watchers and the log when the model is asked again. `attempt` counts from 1."""
    call = current_call.get()
    said: dict[str, Any] = {
        "code": error.code,
        "delay_ms": round(delay_ms),
        "attempt": attempt,
        "model": model,
    }
    log.warning("llm.retrying", run_id=call.run_id if call else None, **said, error=error.message)
    if call is not None and call.tell is not None:
        call.tell("llm.retrying", {**said, "error": error.message, "call": call.call_id})
