"""Retries at the boundary: the only place that decides whether a failed request is sent again at once.

What is not repeated here reaches the run, which suspends and holds no worker while it waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from openagents_worker.agents import LLMRetryOptions
from openagents_worker.errors import LLMError, LLMRateLimitError
from openagents_worker.llm.base import current_call
from openagents_worker.telemetry import get_logger

__all__ = ["LONGEST_RETRY_AFTER_MS", "pause_ms", "retry_after_ms", "tell_retry"]

log = get_logger(__name__)


LONGEST_RETRY_AFTER_MS = 7 * 24 * 3_600_000
"""A week: what asks for more has made a mistake, in the unit for example."""


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
        call.tell("llm.retrying", {**said, "error": error.message, "call": call.call_key})


def retry_after_ms(headers: Mapping[str, str], *, now: datetime | None = None) -> int | None:
    """How long a reply asks to stay away: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date is measured against the reply's own `Date`, because the provider's clock need not agree with ours.
    Anything unreadable counts as not given.
    """
    given = _number(headers.get("retry-after-ms"))
    if given is None and (seconds := _number(headers.get("retry-after"))) is not None:
        given = seconds * 1000
    if given is None and (date := _date(headers.get("retry-after"))) is not None:
        server_now = _date(headers.get("date")) or now or datetime.now(UTC)
        given = (date - server_now).total_seconds() * 1000
    return None if given is None else math.ceil(min(max(0.0, given), LONGEST_RETRY_AFTER_MS))


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(text: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError, TypeError):  # a year of many digits
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
