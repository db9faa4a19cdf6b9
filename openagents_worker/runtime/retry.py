"""When a run that met a retryable error goes on: the only place that knows the back-off."""

from __future__ import annotations

from collections.abc import Callable

from openagents_worker.retry_after import MAX_RETRY_AFTER_MS

__all__ = ["DEFAULT_MAX_RESUME_ATTEMPTS", "back_off_ms"]

DEFAULT_MAX_RESUME_ATTEMPTS = 3
FIRST_MS = 500
CAP_MS = 60_000


def back_off_ms(failed_before: int, retry_after_ms: object, chance: Callable[[], float]) -> int:
    """Milliseconds to wait: exponential with equal jitter, and never less than what the other side asked for.

    Equal jitter (half fixed, half by chance) keeps a thundering herd apart without a wait of nearly nothing:
    Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    ceiling = min(CAP_MS, FIRST_MS * 2 ** min(failed_before, 16))
    wait = ceiling / 2 + chance() * ceiling / 2
    return max(int(wait), _asked_for_ms(retry_after_ms))


def _asked_for_ms(retry_after_ms: object) -> int:
    """What the error says, where it is a number: an error class of a plugin may hold anything there."""
    if not isinstance(retry_after_ms, int | float) or not retry_after_ms > 0:  # also NaN
        return 0
    return int(min(retry_after_ms, MAX_RETRY_AFTER_MS))
