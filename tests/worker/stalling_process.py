"""A process with a stall monitor and no worker: its event loop, or a thread, stalls as requested.

`python -m tests.worker.stalling_process REDIS_URL WHERE HOW LOOP_DEAD_S LEASE_S`. It prints `ready` and the
id of the monitor process once that runs, and `done` when HOW is over.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

from openagents_worker.runtime.latch import Latch
from openagents_worker.runtime.marks import HEAD, Marks, mark_of, marked
from openagents_worker.runtime.user_code import RunCode, current_run, executing
from openagents_worker.settings import load_settings
from openagents_worker.store.client import Cell
from openagents_worker.telemetry.logs import configure_logging
from openagents_worker.time_limits import TimeLimits
from openagents_worker.tools.offload import work_off_loop
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.stall_monitor import StallMonitor
from tests.faults.plugins import hold_the_interpreter
from tests.support.waiting import await_for, wait_for


def main(url: str, where: str, how: str, loop_dead_s: float, lease_s: float) -> None:
    configure_logging(load_settings())
    signal.signal(
        signal.SIGTERM, lambda *_: print_line("terminated")
    )  # as the handler of Celery: it needs the GIL
    limits = TimeLimits.of(
        lease_ms=round(lease_s * 1000), heartbeat_ms=round(lease_s * 250), loop_dead_s=loop_dead_s
    )
    lease = WorkerLease("w1@test:1", limits=limits, sent_s=boot_clock())
    loop_thread = LoopThread()
    loop_thread.start()
    marks = Marks(is_shared=True)
    works = threading.Event()
    if where != "idle":
        works.set()
    monitor = StallMonitor(
        marks,
        cell=Cell(url),
        limits=limits,
        loop_thread_ids=lambda: (loop_thread.native_thread_id or 0, loop_thread.thread_id or 0),
        is_busy=works.is_set,
    )
    monitor.start()
    monitor.lease_begins(lease)
    wait_for(lambda: monitor.pid, "the monitor process runs")
    if where == "idle":
        wait_for(lambda: HEAD.unpack_from(marks._memory)[-1] == 1, "it is idle")
        works.set()
        monitor.work_begins()
        wait_for(lambda: HEAD.unpack_from(marks._memory)[-1] == 0, "it is busy again")
    print_line(f"ready {monitor.pid}")

    async def start() -> None:
        code, other = (
            RunCode(run_id, agent_id, Latch(), marks, lease.incarnation)
            for run_id, agent_id in (("r1", "shop"), ("r2", "bank"))
        )
        current_run.set(code)
        work_off_loop.set(code.off_loop)
        marked.set(code.mark())
        await asyncio.create_task(execute(where, how, other), name="run r1")

    loop_thread.run(start())
    print_line("done")
    monitor.stop()
    loop_thread.stop()


async def execute(where: str, how: str, other: RunCode) -> None:
    match where:
        case "loop" | "idle":
            with executing("pattern", "shop.Careful"):
                await asyncio.sleep(0)
                do(how)
        case "thread":
            with executing("tool", "search", "search:1:1"):
                await asyncio.to_thread(do, how)
        case "two threads":
            # Either could hold the GIL: a waiting thread of another run, and a thread without a run.
            began = threading.Event()

            def wait() -> None:
                began.set()
                threading.Event().wait()

            marked.set(mark_of(other.mark_prefix, "tool", "wait"))
            waiting = asyncio.create_task(asyncio.to_thread(wait))
            await await_for(began.is_set, "the thread waits")
            threading.Thread(target=do, args=(how,)).start()
            await waiting
        case "unknown thread":
            holding = threading.Thread(target=do, args=(how,))
            holding.start()
            await await_for(lambda: not holding.is_alive(), "the thread has released the GIL", 600)


def do(how: str) -> None:
    match how.split():
        case ["python", rounds]:  # it computes and releases the GIL regularly
            for _ in range(int(rounds)):
                sum(range(1000))
        case ["stop"]:  # until a SIGCONT
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["wait", seconds]:
            threading.Event().wait(float(seconds))
        case _:
            hold_the_interpreter(how)


def print_line(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    url, where, how, loop_dead_s, lease_s = sys.argv[1:]
    main(url, where, how, float(loop_dead_s), float(lease_s))
