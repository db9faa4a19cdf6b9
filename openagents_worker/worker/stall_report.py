"""The stall report: the only place that names the code which held the interpreter of a killed worker.

It is a process that `worker.stall_monitor_process` starts when a worker has stood still for most of the time
that it may. The worker is stopped meanwhile, and is killed when this process has ended.
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

BURNING = 0.3  # of the time: a thread that waits for the interpreter uses hundredths
MAX_THREADS = 100  # whose stacks are logged; `faulthandler` shows no more
WHY = "one call keeps the interpreter (the GIL): no other thread of the process can run"
HINT = (
    "the first lines of `stack` say which call it is: a regular expression, an extension in C, a huge integer"
)


def main() -> None:
    try:
        told = marshal.load(sys.stdin.buffer)  # noqa: S302 - from the guard, whose child this is
    except EOFError:  # the worker goes on
        return
    _begin_log(told["log_is_json"])
    report(told)
    logging.shutdown()
    os._exit(0)  # the worker's end waits for it


def report(told: Mapping[str, Any]) -> None:
    """Name the run in Redis, where it is known, and write the log: one line, and one a thread."""
    seen = MarksSnapshot.of(told["memory"])
    found = holders(seen, told["used_s"], told["waiting"], told["held_s"])
    known = [each.executing for each in found if each.executing is not None]
    is_certain = len(known) == len(found) and len({each.run_id for each in known}) == 1
    if is_certain:
        _accuse(told, known[0])
    stacks = stacks_by_thread(told["stacks"])
    log.error(
        "loop.dead",
        silent_s=round(told["held_s"], 1),
        why=WHY,
        pid=told["pid"],
        **_described(found, is_certain=is_certain),
        stack=next((stacks[each.ident] for each in found if each.ident in stacks), ""),
        hint=HINT,
        exit_code=told["exit_code"],
    )
    for ident, stack in list(stacks.items())[:MAX_THREADS]:
        log.error("thread.stack", pid=told["pid"], thread=f"{ident:#x}", stack=stack)


def holders(
    seen: MarksSnapshot, used_s: Mapping[int, float], waiting: Collection[int], held_s: float
) -> list[MarkOfThread]:
    """The threads that may keep the interpreter. It is certain who does where all of them are marked.

    A run whose code is on the event loop and does not wait for the interpreter has blocked the loop for all
    of the time, whatever else there is. Else it is a thread that computes. Where none does, it sleeps: like
    many that have nothing to do with it.
    """
    burning = [tid for tid, used in used_s.items() if used >= BURNING * held_s]
    loop = seen.loop
    if loop.executing is not None and (loop.native_id in burning or loop.native_id not in waiting):
        return [loop]
    marked = {each.native_id: each for each in seen.threads}
    if burning:
        return [marked.get(tid) or MarkOfThread(tid, 0, None) for tid in burning]
    asleep = [each for each in seen.threads if each.native_id not in waiting]
    return [*asleep, MarkOfThread(0, 0, None)]


def stacks_by_thread(dump: str) -> dict[int, str]:
    """What `faulthandler` wrote of each thread, the innermost frame first, by Python's number of it."""
    parts = re.split(r"^(?:Current thread|Thread) (0x[0-9a-f]+)[^\n]*\n", dump, flags=re.MULTILINE)
    return {int(ident, 16): text.strip() for ident, text in zip(parts[1::2], parts[2::2], strict=True)}


def _described(found: list[MarkOfThread], *, is_certain: bool) -> dict[str, Any]:
    known = [_fields(each.executing) for each in found if each.executing is not None]
    if is_certain:
        return known[0]
    return {"candidates": known, "other_threads": len(found) - len(known)}


def _fields(executing: Executing) -> dict[str, str]:
    said = {
        "run_id": executing.run_id,
        "agent_id": executing.agent_id,
        "plugin": executing.plugin,
        "call_id": executing.call_id,
        "incarnation": executing.incarnation,
    }
    return {name: value for name, value in said.items() if value}


def _accuse(told: Mapping[str, Any], executing: Executing) -> None:
    run_id, incarnation = executing.run_id, executing.incarnation
    try:
        cell = Cell(**told["cell"])
        accuse_run(cell, within_s=told["accuse_s"], run_id=run_id, incarnation=incarnation)
    except Exception:  # without the word about it the worker is ended all the same
        log.exception("run.not_accused", run_id=run_id)


def _begin_log(is_json: bool) -> None:
    """As the worker's log looks, on the stream that it is written to."""
    try:
        begin_log_of_child(is_json)
        if not is_json:
            configure_logging(load_settings())
    except Exception:  # noqa: BLE001 - a setting that cannot be read here must not hide the report
        logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
