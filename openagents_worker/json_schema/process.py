"""The check process: a separate program that checks values against JSON Schemas and can be killed.

A pattern or a schema can be crafted so that a check never ends, and it holds the GIL meanwhile. Here it ends
only a process that does nothing else.

Protocol: each line of stdin is a question in JSON, each line of stdout its answer. The first line of stdin
has options instead: `path` (the module search path), `cpu_s` (CPU time limit of one check) and `memory_bytes`
(memory limit of the process). The kernel kills the process if a check exceeds `cpu_s`. CPU time does not pass
while the machine is busy with other work.
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

NICE_INCREMENT = 5  # so that with few cores the worker's other runs have priority
OUT_OF_MEMORY = 77  # the exit code if there is no memory to read a question or to write an answer


def main() -> None:
    """Answer questions until stdin is closed."""
    options = json.loads(sys.stdin.buffer.readline() or "{}")
    sys.path[:] = options["path"]
    from openagents_worker.json_schema.mistakes import load_validator, mistakes  # needs the new path

    load_validator()  # before the limits of a single check
    _prepare_signals()
    os.nice(NICE_INCREMENT)
    _limit_memory(options["memory_bytes"])
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, options["cpu_s"])
        answer = _answer(line, mistakes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes, mistakes: Any) -> dict[str, Any]:
    """`{"problem": …}` with the result of the check, or `{"over": …}` with the limit that was exceeded."""
    try:
        question = json.loads(line)
        return {"problem": mistakes(question["schema"], question["value"], question["part"])}
    except MemoryError:
        return {"over": "memory"}
    except RecursionError:
        return {"over": "nesting"}
    except Exception as error:  # noqa: BLE001 - not expected for an accepted schema; the process must go on
        return {"over": f"{type(error).__name__}: {error}"[:300]}


def _prepare_signals() -> None:
    """Let the CPU timer (SIGPROF) end the process, and ignore SIGINT and SIGTERM.

    A signal to the worker's process group reaches this process too, while draining runs still need it. The
    process ends when stdin is closed.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)


def _limit_memory(limit_bytes: int) -> None:
    """Limit the address space. Also make the kernel's OOM killer choose this process before the worker."""
    with suppress(ValueError, OSError):  # not supported on every system
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
