"""The lease by the process's own clock: it ends before Redis's, and once and for ever."""

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


def test_the_local_end_comes_a_fifth_of_the_lease_before_redis_thinks_so() -> None:
    """The margin is for letting go."""
    assert lease_of(Clock()).remaining_s() == 8.0


def test_a_renewal_counts_from_when_it_was_sent() -> None:
    """The answer may have taken long; Redis counted from when it got the question at the earliest."""
    clock = Clock()
    lease = lease_of(clock)

    clock.now = 106.0
    lease.renewed(sent_s=104.0)

    assert lease.remaining_s() == 6.0


def test_a_lease_that_is_over_is_never_renewed() -> None:
    """A good answer that comes too late changes nothing: the runs may have been told to let go."""
    clock = Clock()
    lease = lease_of(clock)

    clock.now = 108.5
    lease.renewed(sent_s=107.9)

    assert lease.remaining_s() == 0.0


def test_a_clock_that_steps_back_does_not_revive_a_lease() -> None:
    """What has been seen to be over stays over."""
    clock = Clock()
    lease = lease_of(clock)
    clock.now = 109.0
    assert lease.remaining_s() == 0.0

    clock.now = 101.0

    assert lease.remaining_s() == 0.0


def test_a_process_without_a_lease_may_not_act() -> None:
    """Before its first registration there is nothing to let go of, and nothing may be done."""
    lease = WorkerLease.none_yet(LIMITS)

    assert lease.remaining_s() == 0.0
    assert lease.let_go.is_set()
