"""Fixtures of the worker's tests: a cell, a worker driven by hand, a loop thread, a running heartbeat."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

import pytest

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store.client import Cell
from openagents_worker.store.scripts import Wake
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.connection_checks import CHECK_EVERY_S
from openagents_worker.worker.heartbeat import (
    Heartbeat,
    HeartbeatCallbacks,
    HeartbeatLimits,
    WorkerRegistration,
)
from openagents_worker.worker.local_processes import ProcessIdentity
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import LoopWatchdog, WatchedLoop
from tests.support.scripts import Hand
from tests.worker.run_host import RecordingRunHost

LEASE_MS = 1_000
HEARTBEAT_MS = 100

StartHeartbeat = Callable[..., Heartbeat]


@pytest.fixture
def cell(redis_url: str) -> Cell:
    return Cell(redis_url)


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        yield hand


@pytest.fixture
def loop_thread() -> Generator[LoopThread]:
    thread = LoopThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def run_host() -> RecordingRunHost:
    return RecordingRunHost()


@pytest.fixture
def sent() -> list[Wake]:
    """The wake-ups that the parts under test have sent."""
    return []


@pytest.fixture
def given_up() -> list[str]:
    """One entry for each check in which the heartbeat has given up other workers."""
    return []


@pytest.fixture
def start_heartbeat(
    cell: Cell, loop_thread: LoopThread, run_host: RecordingRunHost, sent: list[Wake], given_up: list[str]
) -> Generator[StartHeartbeat]:
    """Starts a heartbeat and its watchdog, by default on the test's cell; both end with the test."""
    with ExitStack() as stack:

        async def send(wakes: Sequence[Wake]) -> None:
            sent.extend(wakes)

        def start(
            cell: Cell = cell,
            *,
            lease_ms: int = LEASE_MS,
            heartbeat_ms: int = HEARTBEAT_MS,
            process: ProcessIdentity | None = None,
            check_every_s: float = CHECK_EVERY_S,
        ) -> Heartbeat:
            heartbeat = Heartbeat(
                cell,
                WorkerRegistration(
                    node="w1@test",
                    announcements=["assistant", '{"queue":"agents","def_hash":"h"}'],
                    process=process,
                ),
                limits=HeartbeatLimits(
                    times=TimeLimits.of(lease_ms=lease_ms, heartbeat_ms=heartbeat_ms),
                    check_every_s=check_every_s,
                ),
                run_host=run_host,
                loop=loop_thread.loop,
                callbacks=HeartbeatCallbacks(
                    send_wakes=send,
                    on_notice=lambda run_id: run_host.latch(run_id, LatchReason.CANCELLED),
                    on_given_up=lambda: given_up.append("given up"),
                ),
            )
            watchdog = LoopWatchdog(
                WatchedLoop(loop=loop_thread.loop, thread_id=lambda: loop_thread.thread_id),
                lease=lambda: heartbeat.lease,
                run_host=run_host,
            )
            heartbeat.start()
            watchdog.start()
            stack.callback(heartbeat.stop)
            stack.callback(watchdog.stop)
            return heartbeat

        yield start
