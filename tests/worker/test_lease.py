"""The lease by the local clock: it expires before the lease in Redis, and for ever."""

from __future__ import annotations

from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.lease import WorkerLease

LIMITS = TimeLimits.of(lease_ms=10_000, heartbeat_ms=2_500)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lease_of(clock: Clock) -> WorkerLease:
    return WorkerLease("w:1", limits=LIMITS, sent_s=clock.now, clock=clock)


def test_the_local_lease_is_a_fifth_shorter_than_the_lease_in_redis() -> None:
    """The margin is the time in which the runs stop."""
    assert lease_of(Clock()).remaining_s() == 8.0


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    """The reply may have taken long; Redis counts from the receipt of the command."""
    clock = Clock()
    lease = lease_of(clock)

    clock.now = 106.0
    lease.renewed(sent_s=104.0)

    assert lease.remaining_s() == 6.0


def test_a_lease_that_is_over_is_never_renewed() -> None:
    """A late confirmation has no effect: the runs may have been stopped."""
    clock = Clock()
    lease = lease_of(clock)

    clock.now = 108.5
    lease.renewed(sent_s=107.9)

    assert lease.remaining_s() == 0.0


def test_a_clock_that_steps_back_does_not_revive_a_lease() -> None:
    """A lease that was seen to be expired stays expired."""
    clock = Clock()
    lease = lease_of(clock)
    clock.now = 109.0
    assert lease.remaining_s() == 0.0

    clock.now = 101.0

    assert lease.remaining_s() == 0.0


def test_a_process_without_a_lease_may_not_act() -> None:
    """Before its first registration it has no runs to stop, and may not act."""
    lease = WorkerLease.none_yet(LIMITS)

    assert lease.remaining_s() == 0.0
    assert lease.runs_stopped.is_set()
