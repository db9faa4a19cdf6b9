"""The time limits are consistent for every lease."""

from __future__ import annotations

import pytest

from openagents_worker.settings import load_settings
from openagents_worker.time_limits import (
    SHORTEST_LEASE_MS,
    TimeLimits,
    default_heartbeat_ms,
    longest_heartbeat_ms,
)

LEASES_MS = (SHORTEST_LEASE_MS, 1_000, 1_500, 2_000, 3_000, 5_000, 10_000, 30_000, 300_000)


def limits_of(lease_ms: int, heartbeat: str) -> TimeLimits:
    beat_ms = default_heartbeat_ms(lease_ms) if heartbeat == "default" else longest_heartbeat_ms(lease_ms)
    return TimeLimits.of(lease_ms=lease_ms, heartbeat_ms=beat_ms)


@pytest.mark.parametrize("heartbeat", ["default", "longest"])
@pytest.mark.parametrize("lease_ms", LEASES_MS)
def test_a_beat_that_fails_is_repeated_before_the_lease_is_over(lease_ms: int, heartbeat: str) -> None:
    """Connecting, waiting for an answer in vain, a pause: the next attempt still counts."""
    limits = limits_of(lease_ms, heartbeat)

    failed_s = limits.beat_s + limits.renewal_connect_s + limits.renewal_answer_s + limits.renewal_pause_s

    assert failed_s < limits.local_lease_s
    assert 2 * limits.beat_s <= limits.local_lease_s
    assert limits.renewal_pause_s > 0


@pytest.mark.parametrize("lease_ms", LEASES_MS)
def test_a_worker_stops_before_others_may_take_its_runs(lease_ms: int) -> None:
    """From a lease of three seconds on; a shorter one is for tests, where code gets a second all the same."""
    limits = limits_of(lease_ms, "default")

    assert limits.local_lease_s + limits.margin_s == pytest.approx(limits.lease_s)
    assert limits.confirm_s == limits.margin_s or lease_ms < 3_000
    assert limits.watch_tick_s < limits.margin_s / 4


@pytest.mark.parametrize("lease_ms", LEASES_MS)
def test_nothing_that_a_run_waits_for_outlives_what_it_must_fit_into(lease_ms: int) -> None:
    """A lost answer is noticed within the lease, a claim outlives it, a stop leaves time for a hand-over."""
    limits = limits_of(lease_ms, "default")

    assert limits.run_answer_s < limits.local_lease_s or lease_ms < 3_000
    assert limits.publish_patience_s < limits.confirm_s
    assert limits.cancel_grace_s <= limits.confirm_s
    assert limits.cancel_grace_s < limits.let_go_s
    assert limits.claim_patience_s > limits.lease_s + limits.renewal_connect_s
    assert limits.heartbeat_stop_s > limits.renewal_connect_s + limits.renewal_answer_s


@pytest.mark.parametrize("heartbeat_ms", [0, -1, 401, 1_000])
def test_a_heartbeat_that_cannot_keep_the_lease_has_no_limits(heartbeat_ms: int) -> None:
    """Settings refuse it with a sentence for people; nothing else makes it by accident."""
    with pytest.raises(ValueError, match="too slow for a lease of 1000 ms"):
        TimeLimits.of(lease_ms=1_000, heartbeat_ms=heartbeat_ms)


def test_every_limit_has_a_rule_and_a_reason() -> None:
    """Each limit has a rule and a reason."""
    assert all(rule and reason.endswith(".") for _, rule, reason in TimeLimits.explained())


def test_the_settings_give_the_limits() -> None:
    """Limits from the environment are used unchanged."""
    limits = load_settings({"OPENAGENTS_DRAIN_TIMEOUT_S": "7", "OPENAGENTS_LOOP_DEAD_S": "60"}).time_limits

    assert (limits.lease_s, limits.beat_s, limits.drain_s, limits.loop_dead_s) == (10.0, 2.5, 7.0, 60.0)
