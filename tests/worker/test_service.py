"""The service: the background parts of a process start in one order and stop in the reverse one."""

from __future__ import annotations

import threading

import pytest

from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.part_health import PartProblem, PartState
from openagents_worker.worker.background import UNAVAILABLE, Health
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.service import LoopPart, Service


class RecordedPart:
    """A part that records its start and stop, and fails at one of them if `fails_at` names it."""

    def __init__(self, name: str, calls: list[str], fails_at: str = "") -> None:
        self.name = name
        self.health = Health()
        self._calls = calls
        self._fails_at = fails_at

    def start(self) -> None:
        self._record("start")

    def stop(self) -> None:
        self._record("stop")

    def _record(self, what: str) -> None:
        self._calls.append(f"{what} {self.name}")
        if what == self._fails_at:
            raise ZeroDivisionError("a bug")


def test_parts_stop_in_the_reverse_order_of_their_start() -> None:
    """So a part may use the parts before it until it is stopped."""
    calls: list[str] = []
    service = Service([RecordedPart("a", calls), RecordedPart("b", calls)])

    service.start()
    service.stop()
    service.stop()  # it has no effect

    assert calls == ["start a", "start b", "stop b", "stop a"]


def test_a_part_that_does_not_stop_keeps_no_other_part_running(caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged with its name."""
    calls: list[str] = []
    service = Service([RecordedPart("a", calls), RecordedPart("b", calls, fails_at="stop")])

    service.start()
    service.stop()

    assert calls[-2:] == ["stop b", "stop a"]
    assert "part.not_stopped" in caplog.text
    assert "part=b" in caplog.text


def test_a_part_that_does_not_start_stops_the_service() -> None:
    """No thread and no connection is left behind."""
    calls: list[str] = []
    service = Service([RecordedPart("a", calls), RecordedPart("b", calls, fails_at="start")])

    with pytest.raises(ZeroDivisionError):
        service.start()

    assert calls == ["start a", "start b", "stop b", "stop a"]


def test_a_part_on_the_loop_starts_and_stops_there(loop_thread: LoopThread) -> None:
    """Its coroutines may use the loop's connections."""
    threads: list[int] = []

    async def note_thread() -> None:
        threads.append(threading.get_ident())

    part = LoopPart("mine", loop_thread, health=Health(), on_start=note_thread, on_stop=note_thread)
    part.start()
    part.stop()

    assert threads == [loop_thread.thread_id] * 2


def test_health_is_the_last_good_round_and_the_last_error() -> None:
    """A part fails while its last error is newer than its last good round."""
    now_s = 100.0
    health = Health(clock=lambda: now_s)
    assert not health.report().is_failing

    health.succeeded()
    now_s += 2
    health.failed(ValueError("no"))
    now_s += 3
    failing = health.report()
    health.succeeded()

    assert (failing.rounds, failing.good_s_ago, failing.error_s_ago) == (1, 5.0, 3.0)
    assert (failing.last_error, failing.is_failing) == ("ValueError: no", True)
    assert not health.report().is_failing
    assert health.report().last_error == "ValueError: no"


def test_a_part_fails_from_its_first_failed_round_in_a_row() -> None:
    """Other processes see since when, how often, and the code of the last error, for minutes also later."""
    now_s = 100.0
    health = Health(clock=lambda: now_s)
    assert health.report().problem("outbox") is None

    health.failed(RedisUnreachable("no answer"))
    now_s += 5
    health.failed(ValueError("no"))
    now_s += 2
    failing = health.report().problem("outbox")
    health.succeeded()
    now_s += 60
    recovered = health.report().problem("outbox")
    now_s += 600

    assert failing == PartProblem("outbox", PartState.FAILING, 7.0, 2, "ValueError")
    assert recovered == PartProblem("outbox", PartState.RECOVERED, 62.0, 0, "ValueError")
    assert health.report().problem("outbox") is None


def test_a_part_that_works_by_the_clock_may_be_late() -> None:
    """A part that only acts on events is never late, nor is a part before its first round."""
    now_s = 100.0
    rescue, acks = Health(clock=lambda: now_s, late_after_s=30), Health(clock=lambda: now_s)
    rescue.failed(RedisUnreachable("no answer"))
    rescue.succeeded()
    acks.succeeded()
    now_s += 1000

    assert rescue.report().problem("rescue") == PartProblem(
        "rescue", PartState.LATE, 1000.0, 0, RedisUnreachable.code
    )
    assert acks.report().problem("completion acks") is None
    assert Health(clock=lambda: now_s, late_after_s=30).report().problem("rescue") is None


def test_a_part_that_this_system_does_not_support_is_not_a_problem() -> None:
    """The worker logs it when it starts; it is in the figures of the worker."""
    health = Health()
    health.failed("no memfd", code=UNAVAILABLE)

    assert health.report().is_failing
    assert health.report().problem("stall monitor") is None
