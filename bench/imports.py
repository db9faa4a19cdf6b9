"""The cost of imports for a producer: `python -m bench imports` prints one line per statement, in
milliseconds.

Each figure is the best of several new interpreters, without the start of the interpreter. Pydantic and Celery
are measured for comparison: they are the largest part, and most applications import them anyway. The test
`tests/typing/test_imports.py` asserts which modules are loaded.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

TRIES = 7
MAX_PACKAGE_MS = 50
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
    """The wall-clock time of the fastest of several new interpreters."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        took.append((time.perf_counter() - began) * 1000)
    return min(took)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the list. Return 0 if `import openagents_worker` is fast enough."""
    del arguments
    nothing = best_ms("pass")
    print(f"{nothing:7.1f} ms  Python itself")
    costs = {what: best_ms(statement) - nothing for what, statement in STATEMENTS}
    for what, cost in costs.items():
        print(f"{cost:+7.1f} ms  {what}")
    return 0 if next(iter(costs.values())) <= MAX_PACKAGE_MS else 1
