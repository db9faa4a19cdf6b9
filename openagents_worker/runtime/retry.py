"""Retries: the only place that computes when a run continues after a retryable error."""

from __future__ import annotations

from collections.abc import Callable

from openagents_worker.retry_after import MAX_RETRY_AFTER_MS

__all__ = ["DEFAULT_MAX_RESUME_ATTEMPTS", "back_off_ms"]

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
    """Milliseconds to wait: exponential back-off with equal jitter, and at least `retry_after_ms`, of which
    at most `longest_ms` count.

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
