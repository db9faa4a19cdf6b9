"""When a failed request is sent again, and how Retry-After is read."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.agents import LLMRetryOptions
from openagents_worker.errors import LLMRateLimitError, LLMResponseError
from openagents_worker.llm.retry import pause_ms
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS, rate_limit_reset_ms, retry_after_ms

NOON = datetime(2025, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("headers", "ms"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2000),
        ({"retry-after": "0.0301"}, 31),
        ({"retry-after": "9", "retry-after-ms": "150"}, 150),
        ({"retry-after": "Thu, 01 May 2025 12:00:30 GMT"}, 30_000),
        ({"retry-after": "Thu, 01 May 2025 12:00:30 GMT", "date": "Thu, 01 May 2025 12:00:10 GMT"}, 20_000),
        ({"retry-after": "Thu, 01 May 2025 11:00:00 GMT"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "nan", "retry-after": "1"}, 1000),
    ],
)
def test_a_reply_says_how_long_to_stay_away(headers: dict[str, str], ms: int | None) -> None:
    """Milliseconds, seconds or a date, relative to the server's clock. Invalid values are ignored."""
    assert retry_after_ms(headers, now=NOON) == ms


NOON_S = int(NOON.timestamp())


@pytest.mark.parametrize(
    ("headers", "ms"),
    [
        ({}, None),
        ({"x-ratelimit-reset-requests": "1s"}, None),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "3"}, None),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "0"}, 1_000),
        (
            {
                "x-ratelimit-reset-requests": "1s",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0.5s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360_500,
        ),
        (
            {
                "x-ratelimit-reset-requests": "120ms",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "17",
            },
            120,
        ),
        (
            {
                "anthropic-ratelimit-input-tokens-reset": "2025-05-01T12:00:30Z",
                "anthropic-ratelimit-input-tokens-remaining": "0",
            },
            30_000,
        ),
        (
            {"X-RateLimit-Reset": str((NOON_S + 9) * 1000), "x-ratelimit-reset": str((NOON_S + 9) * 1000),
             "x-ratelimit-remaining": "0"},
            9_000,
        ),
        ({"x-ratelimit-reset": str(NOON_S + 5), "x-ratelimit-remaining": "0"}, 5_000),
        ({"ratelimit-reset": "50", "ratelimit-remaining": "0"}, 50_000),
        ({"ratelimit-reset": "-50", "ratelimit-remaining": "0"}, 0),
        ({"ratelimit-reset": "1e300", "ratelimit-remaining": "0"}, MAX_RETRY_AFTER_MS),
        ({"ratelimit-reset": "nan", "ratelimit-remaining": "0"}, None),
        ({"ratelimit-reset": "9" * 400, "ratelimit-remaining": "0"}, None),
        ({"ratelimit-reset": "soon", "ratelimit-remaining": "0"}, None),
        (
            {"x-ratelimit-reset-tokens": "9" * 30 + "h", "x-ratelimit-remaining-tokens": "0"},
            MAX_RETRY_AFTER_MS,
        ),
    ],
)  # fmt: skip
def test_the_headers_of_a_rate_limit_say_when_it_is_reset(headers: dict[str, str], ms: int | None) -> None:
    """Of OpenAI, Anthropic, OpenRouter and the IETF. A limit that is not used up does not count."""
    assert rate_limit_reset_ms(headers, now=NOON) == ms


@given(
    jitter=st.floats(min_value=0, max_value=1, exclude_max=True),
    tries=st.integers(min_value=1, max_value=10_000),
    floor=st.integers(min_value=0, max_value=10**9),
    initial=st.integers(min_value=0, max_value=10_000),
    cap=st.integers(min_value=0, max_value=10_000),
    multiplier=st.floats(min_value=1, max_value=100),
    budget=st.none() | st.integers(min_value=1, max_value=100_000),
)
def test_a_pause_is_never_below_the_floor_nor_beyond_its_bounds(
    jitter: float, tries: int, floor: int, initial: int, cap: int, multiplier: float, budget: int | None
) -> None:
    """For all options: floor <= pause <= max(cap, floor), floor <= 2 * cap, and within the budget."""
    options = LLMRetryOptions(
        max_attempts=10_001,
        initial_backoff_ms=initial,
        max_backoff_ms=cap,
        backoff_multiplier=multiplier,
        total_budget_ms=budget,
    )
    error = LLMRateLimitError(retry_after_ms=floor)

    pause = pause_ms(options, error, tries=tries, spent_ms=500, random=lambda: jitter)

    if pause is None:
        assert floor > 2 * cap or (budget is not None and 500 + max(cap, floor) > budget)
    else:
        assert floor <= pause <= max(cap, floor)
        assert budget is None or 500 + pause <= budget


def test_what_will_not_pass_and_what_was_tried_enough_is_not_tried_again() -> None:
    """Errors that are not retryable, and the last try, are raised to the run."""
    options = LLMRetryOptions(max_attempts=2)

    pauses = [
        pause_ms(options, LLMResponseError(), tries=1, spent_ms=0, random=lambda: 0.5),
        pause_ms(options, LLMRateLimitError(), tries=2, spent_ms=0, random=lambda: 0.5),
        pause_ms(options, LLMRateLimitError(), tries=1, spent_ms=0, random=lambda: 0.5),
    ]

    assert pauses == [None, None, 250]
