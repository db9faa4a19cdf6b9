"""How often a worker asks Redis for a run, and what for: counted on the line between the two.

The worker is a real one; a proxy that understands Redis's protocol stands between it and Redis. What any
worker asks whatever it carries (its beat, the rescue of others, the broker's queue) is no run's and is not
counted here.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.proxy import Proxy
from tests.faults.world import World, table
from tests.waiting import wait_for

WHAT_FOR = {
    "claim": "decides whether there is work; brings request, journal, session's length and state",
    "commit": "every call, the first one with checkpoint 0: what is stored is never executed again",
    "emit": "what watchers see of a call while it takes longer than 20 ms",
    "finish": "result, transcript, artifacts, state, the next run: all or nothing",
    "told": "Celery knows of the end, its callbacks are sent: not to be told again",
}
STEPS = (0, 1, 10)
MOST_BESIDE = 2  # beyond claim, one a step, finish and emits: told; and checkpoint 0 where a call takes long


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; 0 when a run asks as little as is claimed."""
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
        {"asks": name, **{f"{n} tools": count[name] for n, count in zip(STEPS, counts, strict=True)}}
        | {"what for": WHAT_FOR.get(name, "?")}
        for name in names
    ]
    total = {f"{n} tools": count.total() for n, count in zip(STEPS, counts, strict=True)}
    rows.append({"asks": "in all", **total, "what for": ""})
    table("What a worker asks Redis for one run whose model asks for so many tools, one a turn", rows)
    floor = [2 + 2 * steps + 1 for steps in STEPS]  # claim, finish, and each call of model and tool
    beside = [count.total() - count["emit"] - least for count, least in zip(counts, floor, strict=True)]
    return 0 if max(beside) <= MOST_BESIDE else 1


def _count(world: World, proxy: Proxy, steps: int) -> Counter[str]:
    """The commands of one run, once the worker has nothing of another to ask any more."""
    _execute(world, f"warm-{steps}", steps)
    proxy.count()
    _execute(world, f"counted-{steps}", steps)
    return Counter(command.name for command in proxy.seen)


def _execute(world: World, run_id: str, steps: int) -> None:
    world.submit(run_id, [("step", {"n": n}) for n in range(steps)])
    world.wait(run_id)
    store = world.client.store
    key = store.keys("run", run_id)
    wait_for(lambda: store.ask(lambda redis: redis.hget(key, "untold")) is None, "Celery was told")
