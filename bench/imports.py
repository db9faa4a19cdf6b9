"""What importing costs a producer: `python -m bench imports` prints one line a statement, in milliseconds.

The best of several fresh interpreters, less what the interpreter itself needs. Pydantic and Celery stand
beside ours: they are most of it, and a product that submits runs has them anyway. Which modules are loaded,
which is what can be promised, is asserted in `tests/typing/test_imports.py`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

TRIES = 7
MOST_FRONT_DOOR_MS = 50
A_MODEL = "from pydantic import BaseModel; type('Model', (BaseModel,), {})"
A_TASK = """
from celery import Celery
import kombu.transport.redis, pydantic_settings, redis.asyncio
app = Celery('product', broker='redis://')
@app.task
def task(): ...
task.delay
"""
STATEMENTS = (
    ("import openagents_worker", "import openagents_worker"),
    ("a model of pydantic's", A_MODEL),
    (
        "from openagents_worker import RunRequest, RunResult",
        "from openagents_worker import RunRequest, RunResult",
    ),
    ("a task of Celery's on Redis, a model", A_TASK + A_MODEL),
    (
        "from openagents_worker import RunRequest, run_agent; run_agent.delay",
        "from openagents_worker import RunRequest, run_agent; run_agent.delay",
    ),
)


def best_ms(statement: str) -> float:
    """The fastest of some fresh interpreters that run it; wall-clock."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        took.append((time.perf_counter() - began) * 1000)
    return min(took)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the list; 0 when the front door costs less than is claimed."""
    del arguments
    nothing = best_ms("pass")
    print(f"{nothing:7.1f} ms  Python itself")
    costs = {what: best_ms(statement) - nothing for what, statement in STATEMENTS}
    for what, cost in costs.items():
        print(f"{cost:+7.1f} ms  {what}")
    return 0 if next(iter(costs.values())) <= MOST_FRONT_DOOR_MS else 1
