"""What the guard makes of what it sees: whether a worker stands still, and who keeps its interpreter."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

import pytest

from openagents_worker.runtime.marks import Executing, MarkOfThread, MarksSnapshot
from openagents_worker.worker.stall_monitor_process import (
    LOOK_S,
    Threads,
    stood_still_s,
    switches_of,
    threads_of,
)
from openagents_worker.worker.stall_report import holders, stacks_by_thread

LOOP, TOOL, OTHER, STRANGER = 1, 2, 3, 4  # as the system numbers these threads
R1, R2, R3 = (Executing(run_id) for run_id in ("r1", "r2", "r3"))
NOBODY = "?"


def seen(on_loop: Executing | None = None, **tools: Executing) -> MarksSnapshot:
    numbers = {"tool": TOOL, "other": OTHER}
    threads = tuple(MarkOfThread(numbers[name], 100, executing) for name, executing in tools.items())
    return MarksSnapshot(MarkOfThread(LOOP, 99, on_loop), threads)


BUSY, IDLE = 2.0, 0.01  # of the two seconds in which the worker stood still


@pytest.mark.parametrize(
    ("marks", "used_s", "waiting", "named"),
    [
        pytest.param(seen(R1), {LOOP: BUSY}, [], ["r1"], id="the loop computes"),
        pytest.param(seen(R1), {LOOP: IDLE}, [TOOL], ["r1"], id="the loop sleeps"),
        pytest.param(seen(R1, tool=R2), {LOOP: BUSY, TOOL: IDLE}, [TOOL], ["r1"], id="a tool waits for it"),
        pytest.param(seen(R1, tool=R2), {LOOP: IDLE, TOOL: BUSY}, [LOOP], ["r2"], id="a tool computes"),
        pytest.param(seen(tool=R2), {LOOP: IDLE, TOOL: BUSY}, [LOOP], ["r2"], id="nobody is on the loop"),
        pytest.param(
            seen(R1, tool=R2), {LOOP: BUSY, TOOL: BUSY}, [], ["r1"], id="both, and the loop was blocked"
        ),
        pytest.param(
            seen(tool=R2, other=R3), {TOOL: BUSY, OTHER: BUSY}, [LOOP], ["r2", "r3"], id="two tools compute"
        ),
        pytest.param(
            seen(tool=R2), {TOOL: BUSY, STRANGER: BUSY}, [], ["r2", NOBODY], id="a tool and a stranger"
        ),
        pytest.param(seen(R1), {STRANGER: BUSY}, [LOOP], [NOBODY], id="a stranger computes"),
        pytest.param(seen(), {LOOP: BUSY}, [], [NOBODY], id="the loop, for no run"),
        pytest.param(
            seen(tool=R2), {LOOP: IDLE, TOOL: IDLE}, [LOOP], ["r2", NOBODY], id="it sleeps: it may be anybody"
        ),
        pytest.param(seen(tool=R2), {TOOL: IDLE}, [LOOP, TOOL], [NOBODY], id="all tools wait for it"),
        pytest.param(seen(), {}, [], [NOBODY], id="nothing is known"),
    ],
)
def test_who_may_keep_the_interpreter(
    marks: MarksSnapshot, used_s: dict[int, float], waiting: list[int], named: list[str]
) -> None:
    """It is certain only where nobody unknown is among them."""
    found = holders(marks, used_s, waiting, 2.0)

    assert [each.executing.run_id if each.executing else NOBODY for each in found] == named


def states(**threads: tuple[str, float]) -> Threads:
    return {number: (ord(state), used_s) for number, (state, used_s) in enumerate(threads.values())}


@pytest.mark.parametrize(
    ("now", "counted_s"),
    [
        pytest.param(states(a=("R", 10.25), b=("S", 5.0)), 0.25, id="it computes"),
        pytest.param(states(a=("R", 10.05), b=("S", 5.0)), 0.05, id="it gets a core for a fifth"),
        pytest.param(states(a=("R", 10.0), b=("S", 5.0)), 0.0, id="it gets no core"),
        pytest.param(states(a=("S", 10.0), b=("S", 5.0)), 0.25, id="all sleep"),
        pytest.param(states(a=("S", 10.0), b=("I", 5.0)), 0.25, id="all sleep, one idle"),
        pytest.param(states(a=("D", 10.0), b=("S", 5.0)), 0.0, id="it waits for a disk, or its memory"),
        pytest.param(states(a=("T", 10.2), b=("T", 5.0)), 0.0, id="it is stopped"),
        pytest.param(states(a=("t", 10.2), b=("S", 5.0)), 0.0, id="a debugger has it"),
        pytest.param(states(a=("R", 10.25), b=("R", 5.25)), 0.25, id="two compute"),
        pytest.param(states(a=("Z", 10.0), b=("S", 5.0)), 0.0, id="its first thread has ended"),
        pytest.param({7: (ord("R"), 3.0)}, 0.0, id="a thread that was not there"),
    ],
)
def test_how_long_a_worker_stood_still_although_it_could_beat(now: Threads, counted_s: float) -> None:
    """Only what is to blame for it counts."""
    before = states(a=("R", 10.0), b=("S", 5.0))

    assert stood_still_s(before, now, LOOK_S) == pytest.approx(counted_s)


def test_the_threads_of_a_process_are_seen() -> None:
    """Also one whose name would break the line."""
    ending = threading.Event()
    thread = threading.Thread(target=ending.wait, name="a) R 1 2 (b")
    thread.start()
    try:
        found, switches = threads_of(os.getpid()), switches_of(os.getpid())
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
