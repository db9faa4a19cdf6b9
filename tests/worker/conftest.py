"""What the worker's tests share: a cell, a worker by hand, a loop in a thread, a beating heart."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack

import pytest

from openagents_worker.store.client import Cell
from openagents_worker.store.scripts import Wake
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.connection_checks import LOOK_EVERY_S
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.local_processes import ProcessIdentity
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import LoopWatchdog
from tests.producer.hand import Hand
from tests.worker.run_host import NotingCarrier

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
def bridge() -> Generator[LoopThread]:
    thread = LoopThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def run_host() -> NotingCarrier:
    return NotingCarrier()


@pytest.fixture
def sent() -> list[Wake]:
    """The wake-ups that the parts under test have sent."""
    return []


@pytest.fixture
def given_up() -> list[str]:
    """One word for each time that the heartbeat has given up others."""
    return []


@pytest.fixture
def start_heartbeat(
    cell: Cell, bridge: LoopThread, run_host: NotingCarrier, sent: list[Wake], given_up: list[str]
) -> Generator[StartHeartbeat]:
    """Starts a heartbeat with its watch, by default of the test's cell; both end with the test."""
    with ExitStack() as stack:

        async def send(wakes: Sequence[Wake]) -> None:
            sent.extend(wakes)

        def start(
            cell: Cell = cell,
            *,
            lease_ms: int = LEASE_MS,
            heartbeat_ms: int = HEARTBEAT_MS,
            process: ProcessIdentity | None = None,
            look_every_s: float = LOOK_EVERY_S,
        ) -> Heartbeat:
            heartbeat = Heartbeat(
                cell=cell,
                node="w1@test",
                limits=TimeLimits.of(lease_ms=lease_ms, heartbeat_ms=heartbeat_ms),
                announcements=["assistant", '{"queue":"agents","def_hash":"h"}'],
                run_host=run_host,
                loop=bridge.loop,
                send_wakes=send,
                on_registered=lambda incarnation: None,
                process=process,
                look_every_s=look_every_s,
                on_given_up=lambda: given_up.append("given up"),
            )
            watch = LoopWatchdog(
                loop=bridge.loop,
                loop_thread_id=lambda: bridge.thread_id,
                lease=lambda: heartbeat.lease,
                run_host=run_host,
            )
            heartbeat.start()
            watch.start()
            stack.callback(heartbeat.retire)
            stack.callback(watch.stop)
            return heartbeat

        yield start
