"""The drain: how a stopping worker hands its runs over."""

from __future__ import annotations

import pytest

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.drain import drain
from tests.support.clocks import run_without_waiting
from tests.worker.run_host import RecordingRunHost


def limits(drain_s: float) -> TimeLimits:
    return TimeLimits.of(lease_ms=1_000, heartbeat_ms=250, drain_timeout_s=drain_s)


async def test_a_drain_accepts_no_run_and_hands_every_run_over() -> None:
    """Each run continues on another worker from its last commit."""
    run_host = RecordingRunHost("r1", "r2")

    assert await drain(run_host, limits(drain_s=5))

    assert not run_host.accepting
    assert run_host.all_latched == [LatchReason.HANDOVER]
    assert not run_host.hurried
    assert run_host.known() == frozenset()


def test_a_drain_ends_in_time_whatever_its_runs_do() -> None:
    """An orchestrator kills a process that takes longer."""
    run_host = RecordingRunHost("stuck")
    run_host.stop_allowed.clear()

    handed_over, took_s = run_without_waiting(drain(run_host, limits(drain_s=5)))

    assert not handed_over
    assert run_host.hurried
    assert took_s == pytest.approx(5 + limits(drain_s=5).let_go_s)
