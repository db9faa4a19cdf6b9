"""The stall report: the only place that identifies the code that holds the GIL of a stalled worker.

`worker.stall_monitor_process` starts this process when a worker has been stalled for most of the allowed
time. The worker is stopped meanwhile, and is killed when this process has ended.
"""

from __future__ import annotations

import logging
import marshal
import os
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from openagents_worker.runtime.marks import Executing, MarkOfThread, MarksSnapshot
from openagents_worker.settings import load_settings
from openagents_worker.store.client import Cell
from openagents_worker.telemetry.logs import begin_log_of_child, configure_logging, get_logger
from openagents_worker.worker.accusing import accuse_run

__all__ = ["holders", "main", "report", "stacks_by_thread"]

log = get_logger(__name__)

BUSY_SHARE = 0.3  # of the stall; a thread that waits for the GIL uses about 0.01
MAX_THREADS = 100  # threads whose stacks are logged; `faulthandler` dumps no more
WHY = "one call holds the interpreter lock (the GIL): no other thread of the process can run"
HINT = "the first lines of `stack` show the call: a regular expression, an extension in C, a huge integer"


def main() -> None:
    """Read the data of the stall from standard input, report it, and exit."""
    try:
        stall = marshal.load(sys.stdin.buffer)  # noqa: S302 - from the stall monitor, the parent process
    except EOFError:  # the worker is no longer stalled
        return
    _set_up_log(stall["log_is_json"])
    report(stall)
    logging.shutdown()
    os._exit(0)  # the end of the worker waits for this process


def report(stall: Mapping[str, Any]) -> None:
    """Record the run in Redis if it is certain, and log one line for the stall and one for each thread."""
    seen = MarksSnapshot.of(stall["memory"])
    suspects = holders(seen, stall["used_s"], stall["waiting"], stall["held_s"])
    known = [each.executing for each in suspects if each.executing is not None]
    is_certain = len(known) == len(suspects) and len({each.run_id for each in known}) == 1
    if is_certain:
        _record_suspect(stall, known[0])
    stacks = stacks_by_thread(stall["stacks"])
    log.error(
        "loop.dead",
        silent_s=round(stall["held_s"], 1),
        why=WHY,
        pid=stall["pid"],
        **_fields_of_suspects(suspects, is_certain=is_certain),
        stack=next((stacks[each.ident] for each in suspects if each.ident in stacks), ""),
        hint=HINT,
        exit_code=stall["exit_code"],
    )
    for ident, stack in list(stacks.items())[:MAX_THREADS]:
        log.error("thread.stack", pid=stall["pid"], thread=f"{ident:#x}", stack=stack)


def holders(
    seen: MarksSnapshot, used_s: Mapping[int, float], waiting: Collection[int], held_s: float
) -> list[MarkOfThread]:
    """The threads that may hold the GIL. The holder is certain if all of them execute the same run.

    `used_s`: seconds of processor time per thread id; `waiting`: ids of threads that wait for the GIL;
    `held_s`: the duration of the stall in seconds. If plugin code runs on the event loop and the loop's
    thread does not wait for the GIL, that thread is the holder. Otherwise a thread that uses processor time
    is the holder. If no thread does, the holder sleeps while it holds the GIL, and cannot be distinguished
    from other sleeping threads.
    """
    busy = [tid for tid, used in used_s.items() if used >= BUSY_SHARE * held_s]
    loop = seen.loop
    if loop.executing is not None and (loop.native_id in busy or loop.native_id not in waiting):
        return [loop]
    marked = {each.native_id: each for each in seen.threads}
    if busy:
        return [marked.get(tid) or MarkOfThread(tid, 0, None) for tid in busy]
    asleep = [each for each in seen.threads if each.native_id not in waiting]
    return [*asleep, MarkOfThread(0, 0, None)]


def stacks_by_thread(dump: str) -> dict[int, str]:
    """The stack of each thread from a `faulthandler` dump, innermost frame first, by Python thread id."""
    parts = re.split(r"^(?:Current thread|Thread) (0x[0-9a-f]+)[^\n]*\n", dump, flags=re.MULTILINE)
    return {int(ident, 16): text.strip() for ident, text in zip(parts[1::2], parts[2::2], strict=True)}


def _fields_of_suspects(suspects: list[MarkOfThread], *, is_certain: bool) -> dict[str, Any]:
    """The log fields of the certain holder, or of all suspects."""
    known = [_fields_of(each.executing) for each in suspects if each.executing is not None]
    if is_certain:
        return known[0]
    return {"candidates": known, "other_threads": len(suspects) - len(known)}


def _fields_of(executing: Executing) -> dict[str, str]:
    fields = {
        "run_id": executing.run_id,
        "agent_id": executing.agent_id,
        "plugin": executing.plugin,
        "call_id": executing.call_id,
        "incarnation": executing.incarnation,
    }
    return {name: value for name, value in fields.items() if value}


def _record_suspect(stall: Mapping[str, Any], executing: Executing) -> None:
    """Record in Redis that this run blocks the worker. A failure is logged."""
    run_id, incarnation = executing.run_id, executing.incarnation
    try:
        cell = Cell(**stall["cell"])
        accuse_run(cell, within_s=stall["accuse_s"], run_id=run_id, incarnation=incarnation)
    except Exception:  # the worker is ended even if the run cannot be recorded
        log.exception("run.not_accused", run_id=run_id)


def _set_up_log(is_json: bool) -> None:
    """Log in the format and to the stream of the worker."""
    try:
        begin_log_of_child(is_json)
        if not is_json:
            configure_logging(load_settings())
    except Exception:  # noqa: BLE001 - a setting that cannot be read here must not hide the report
        logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
