"""The Redis commands that a worker sends for one run, counted by a proxy.

The worker is a real process, and the proxy parses the Redis protocol. Commands that do not depend on runs
(heartbeat, rescue loop, the queue of the broker) are not counted.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.support.command_proxy import Proxy
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for

PURPOSES = {
    "claim": "takes the run; returns request, journal, and the length and state of the session",
    "commit": "stores the outcome of each call, and checkpoint 0 with the first one",
    "emit": "events of a call that takes longer than 20 ms",
    "finish": "stores result, transcript, artifacts and state, and starts the next run, atomically",
    "confirm_completion": "records that Celery was notified of the end",
}
STEPS = (0, 1, 10)
MAX_OTHERS = (
    2  # besides claim, commits, finish and emits: `confirm_completion`, and checkpoint 0 before a long call
)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if a run needs no more commands than allowed."""
    del arguments
    with (
        tempfile.TemporaryDirectory() as folder,
        World(Path(folder), workers=1) as world,
        Proxy(world.redis.url) as proxy,
    ):
        world.redis_url_of = proxy.url_of
        world.start()
        counts = [_count(world, proxy, steps) for steps in STEPS]
        world.end()
    names = sorted(set().union(*counts), key=lambda name: -counts[-1][name])
    rows = [
        {"command": name, **{f"{n} tools": count[name] for n, count in zip(STEPS, counts, strict=True)}}
        | {"purpose": PURPOSES.get(name, "?")}
        for name in names
    ]
    total = {f"{n} tools": count.total() for n, count in zip(STEPS, counts, strict=True)}
    rows.append({"command": "total", **total, "purpose": ""})
    table("Redis commands of a worker for one run with this number of tool calls, one per turn", rows)
    floor = [2 + 2 * steps + 1 for steps in STEPS]  # claim, finish, and a commit per call
    others = [count.total() - count["emit"] - least for count, least in zip(counts, floor, strict=True)]
    return 0 if max(others) <= MAX_OTHERS else 1


def _count(world: World, proxy: Proxy, steps: int) -> Counter[str]:
    """The commands of one run. Another run before it warms up the worker."""
    _execute(world, f"warm-{steps}", steps)
    proxy.count()
    _execute(world, f"counted-{steps}", steps)
    return Counter(command.name for command in proxy.seen)


def _execute(world: World, run_id: str, steps: int) -> None:
    world.submit(run_id, [("step", {"n": n}) for n in range(steps)])
    world.wait(run_id)
    store = world.client.store
    key = store.keys("run", run_id)
    wait_for(lambda: store.ask(lambda redis: redis.hget(key, "untold")) is None, "Celery was notified")
