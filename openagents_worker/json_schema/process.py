"""The check process: a program of its own that holds values against JSON Schemas, and that can be killed.

A check may take Python for ever, by a pattern or by a schema that multiplies itself, and it holds the
interpreter while it does. Here it ends one process that does nothing else. Each line of stdin is a question
in JSON, each line of stdout its answer. The first line says how: `path` (where modules are found), `cpu_s`
and `memory_bytes`, the limits of one check and of the process. The kernel ends a process whose check takes
more processor time than that: the time does not pass while the machine does something else.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["OUT_OF_MEMORY"]

NICER = 5  # where processors are few, the worker that waits for an answer goes on with its other runs
OUT_OF_MEMORY = 77  # the exit code where there is not even memory to read the question, or to answer


def main() -> None:
    """Answer one question after the other, until nobody asks any more."""
    options = json.loads(sys.stdin.buffer.readline() or "{}")
    sys.path[:] = options["path"]
    from openagents_worker.json_schema.mistakes import mistakes  # only now it can be found

    _prepare_signals()
    os.nice(NICER)
    _limit_memory(options["memory_bytes"])
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, options["cpu_s"])
        answer = _answer(line, mistakes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes, mistakes: Any) -> dict[str, Any]:
    """`problem`, or the limit of this process that was reached: `over`."""
    try:
        question = json.loads(line)
        return {"problem": mistakes(question["schema"], question["value"], question["part"])}
    except MemoryError:
        return {"over": "memory"}
    except RecursionError:
        return {"over": "nesting"}
    except Exception as error:  # noqa: BLE001 - a schema that is accepted makes the checker raise nothing
        return {"over": f"{type(error).__name__}: {error}"[:300]}


def _prepare_signals() -> None:
    """Let the timer end the process, and nothing else but the end of whoever asks: a signal to the worker's
    group reaches this process, too, while runs still need it."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.SIG_IGN)


def _limit_memory(limit_bytes: int) -> None:
    """Also let a host without memory end this process, and not the worker."""
    with suppress(ValueError, OSError):  # not every system can
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
