"""What importing costs a producer: `python -m bench.imports` prints one line a statement, in milliseconds.

The best of several fresh interpreters, less what the interpreter itself needs. Pydantic and Celery stand
beside ours: they are most of it, and a product that submits runs has them anyway.
"""

from __future__ import annotations

import subprocess
import sys
import time

TRIES = 7
STATEMENTS = (
    "import openagents_worker",
    "from pydantic import BaseModel; type('Model', (BaseModel,), {})",
    "from openagents_worker import RunRequest, RunResult",
    "from celery import Celery, Task; from celery.result import AsyncResult; import redis, pydantic_settings",
    "from openagents_worker import run_agent; run_agent.delay",
)


def best_ms(statement: str) -> float:
    """The fastest of some fresh interpreters that run it; wall-clock."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        took.append((time.perf_counter() - began) * 1000)
    return min(took)


def main() -> None:
    nothing = best_ms("pass")
    print(f"{nothing:7.1f} ms  Python itself")
    for statement in STATEMENTS:
        print(f"{best_ms(statement) - nothing:+7.1f} ms  {statement}")


if __name__ == "__main__":
    main()
