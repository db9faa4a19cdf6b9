"""The stall report: how long a worker is stalled, and which thread may hold the GIL."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import pytest

from openagents_worker.runtime.marks import Executing, MarkOfThread, MarksSnapshot
from openagents_worker.worker.stall_monitor_process import (
    CHECK_S,
    Threads,
    stalled_s,
    threads_of,
    voluntary_switches_of,
)
from openagents_worker.worker.stall_report import holders, stacks_by_thread

LOOP, TOOL, OTHER, UNKNOWN = 1, 2, 3, 4  # thread ids of the operating system
R1, R2, R3 = (Executing(run_id) for run_id in ("r1", "r2", "r3"))
NO_RUN = "?"


def seen(on_loop: Executing | None = None, **tools: Executing) -> MarksSnapshot:
    numbers = {"tool": TOOL, "other": OTHER}
    threads = tuple(MarkOfThread(numbers[name], 100, executing) for name, executing in tools.items())
    return MarksSnapshot(MarkOfThread(LOOP, 99, on_loop), threads)


BUSY, IDLE = 2.0, 0.01  # seconds of processor time in a stall of two seconds


@pytest.mark.parametrize(
    ("marks", "used_s", "waiting", "named"),
    [
        pytest.param(seen(R1), {LOOP: BUSY}, [], ["r1"], id="the loop computes"),
        pytest.param(seen(R1), {LOOP: IDLE}, [TOOL], ["r1"], id="the loop sleeps"),
        pytest.param(
            seen(R1, tool=R2), {LOOP: BUSY, TOOL: IDLE}, [TOOL], ["r1"], id="a tool waits for the GIL"
        ),
        pytest.param(seen(R1, tool=R2), {LOOP: IDLE, TOOL: BUSY}, [LOOP], ["r2"], id="a tool computes"),
        pytest.param(seen(tool=R2), {LOOP: IDLE, TOOL: BUSY}, [LOOP], ["r2"], id="no run is on the loop"),
        pytest.param(
            seen(R1, tool=R2), {LOOP: BUSY, TOOL: BUSY}, [], ["r1"], id="both, and the loop was blocked"
        ),
        pytest.param(
            seen(tool=R2, other=R3), {TOOL: BUSY, OTHER: BUSY}, [LOOP], ["r2", "r3"], id="two tools compute"
        ),
        pytest.param(
            seen(tool=R2), {TOOL: BUSY, UNKNOWN: BUSY}, [], ["r2", NO_RUN], id="a tool and an unknown thread"
        ),
        pytest.param(seen(R1), {UNKNOWN: BUSY}, [LOOP], [NO_RUN], id="an unknown thread computes"),
        pytest.param(seen(), {LOOP: BUSY}, [], [NO_RUN], id="the loop, without a run"),
        pytest.param(
            seen(tool=R2),
            {LOOP: IDLE, TOOL: IDLE},
            [LOOP],
            ["r2", NO_RUN],
            id="the holder sleeps: it may be any thread",
        ),
        pytest.param(seen(tool=R2), {TOOL: IDLE}, [LOOP, TOOL], [NO_RUN], id="all tools wait for the GIL"),
        pytest.param(seen(), {}, [], [NO_RUN], id="nothing is known"),
    ],
)
def test_which_threads_may_hold_the_gil(
    marks: MarksSnapshot, used_s: dict[int, float], waiting: list[int], named: list[str]
) -> None:
    """The holder is certain only if no unknown thread is among them."""
    found = holders(marks, used_s, waiting, 2.0)

    assert [each.executing.run_id if each.executing else NO_RUN for each in found] == named


def states(**threads: tuple[str, float]) -> Threads:
    return {number: (ord(state), used_s) for number, (state, used_s) in enumerate(threads.values())}


@pytest.mark.parametrize(
    ("now", "counted_s"),
    [
        pytest.param(states(a=("R", 10.25), b=("S", 5.0)), 0.25, id="it computes"),
        pytest.param(states(a=("R", 10.05), b=("S", 5.0)), 0.05, id="it gets a core for a fifth of the time"),
        pytest.param(states(a=("R", 10.0), b=("S", 5.0)), 0.0, id="it gets no core"),
        pytest.param(states(a=("S", 10.0), b=("S", 5.0)), 0.25, id="all sleep"),
        pytest.param(states(a=("S", 10.0), b=("I", 5.0)), 0.25, id="all sleep, one idle"),
        pytest.param(states(a=("D", 10.0), b=("S", 5.0)), 0.0, id="it waits for a disk or for memory"),
        pytest.param(states(a=("T", 10.2), b=("T", 5.0)), 0.0, id="it is stopped"),
        pytest.param(states(a=("t", 10.2), b=("S", 5.0)), 0.0, id="a debugger has stopped it"),
        pytest.param(states(a=("R", 10.25), b=("R", 5.25)), 0.25, id="two compute"),
        pytest.param(states(a=("Z", 10.0), b=("S", 5.0)), 0.0, id="its main thread has ended"),
        pytest.param({7: (ord("R"), 3.0)}, 0.0, id="a new thread"),
    ],
)
def test_how_long_a_worker_was_stalled(now: Threads, counted_s: float) -> None:
    """Only time in which it could have beaten counts."""
    before = states(a=("R", 10.0), b=("S", 5.0))

    assert stalled_s(before, now, CHECK_S) == pytest.approx(counted_s)


def test_the_threads_of_a_process_are_seen() -> None:
    """Also a thread with parentheses and spaces in its name."""
    ending = threading.Event()
    thread = threading.Thread(target=ending.wait, name="a) R 1 2 (b")
    thread.start()
    try:
        found, switches = threads_of(os.getpid()), voluntary_switches_of(os.getpid())
    finally:
        ending.set()
        thread.join()

    assert {os.getpid(), thread.native_id} <= found.keys()
    assert {os.getpid(), thread.native_id} <= switches.keys()
    assert found[os.getpid()][0] in b"RS"
    assert found[os.getpid()][1] > 0


def test_stacks_are_read_as_faulthandler_writes_them() -> None:
    """By thread, the innermost frame first."""
    read, write = os.pipe()
    ending = threading.Event()
    thread = threading.Thread(target=ending.wait)
    thread.start()
    try:
        faulthandler.dump_traceback(write, all_threads=True)
        os.close(write)
        with os.fdopen(read) as source:
            stacks = stacks_by_thread(source.read())
    finally:
        ending.set()
        thread.join()

    assert thread.ident in stacks
    assert stacks[threading.get_ident()].splitlines()[0].endswith(f"in {sys._getframe().f_code.co_name}")
    assert stacks_by_thread("") == {}
