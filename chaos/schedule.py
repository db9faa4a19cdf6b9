"""The schedule: which faults happen when. The same seed and duration give the same schedule."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Fault", "FaultKind", "schedule"]


class FaultKind(StrEnum):
    """What is done to the deployment. A length is shorter or longer than the lease."""

    KILL_WORKER = "kill_worker"
    """SIGKILL to a worker; its supervisor starts another one."""
    KILL_ALL_WORKERS = "kill_all_workers"
    """SIGKILL to all workers at the same time."""
    TERMINATE_WORKER = "terminate_worker"
    """SIGTERM: the worker drains and hands its runs over."""
    PAUSE_WORKER = "pause_worker"
    """SIGSTOP, and SIGCONT later."""
    STALL_WORKER = "stall_worker"
    """The connections of a worker to Redis stay open, but transport nothing for some time."""
    CUT_WORKER = "cut_worker"
    """The connections of a worker are reset, and new ones are refused for some time."""
    BLOCK_LOOP = "block_loop"
    """A tool blocks the event loop of its worker."""
    MOVE_CLOCK = "move_clock"
    """The wall clock of a worker jumps by minutes, forward or backward."""
    KILL_REDIS = "kill_redis"
    """SIGKILL to Redis, which starts again from its append-only file."""
    RESTART_REDIS = "restart_redis"
    """Redis shuts down and starts again."""
    SLOW_LOADING = "slow_loading"
    """Redis is killed and answers LOADING for some time after its start."""
    STALL_REDIS = "stall_redis"
    """SIGSTOP to Redis, and SIGCONT later."""
    FULL_REDIS = "full_redis"
    """`maxmemory` is below the used memory: writes are refused with OOM."""
    READ_ONLY_REDIS = "read_only_redis"
    """Redis becomes the replica of an address where nobody listens: writes are refused with READONLY."""
    UNSAVED_REDIS = "unsaved_redis"
    """A snapshot of Redis has failed: writes are refused with MISCONF."""
    FLUSH_SCRIPTS = "flush_scripts"
    """SCRIPT FLUSH: each script is unknown (NOSCRIPT)."""
    KILL_CLIENTS = "kill_clients"
    """CLIENT KILL: all connections are closed."""
    PAUSE_CLIENTS = "pause_clients"
    """CLIENT PAUSE: Redis answers nobody for some time."""
    LOSE_MESSAGES = "lose_messages"
    """Messages are removed from the queue."""
    DOUBLE_MESSAGES = "double_messages"
    """Messages are put into the queue twice."""
    REORDER_MESSAGES = "reorder_messages"
    """The messages of the queue are shuffled."""
    FAIL_OVER = "fail_over"
    """The replica becomes the master (only in a deployment with Sentinel)."""


WEIGHTS: Mapping[FaultKind, int] = {
    FaultKind.KILL_WORKER: 16,
    FaultKind.KILL_ALL_WORKERS: 2,
    FaultKind.TERMINATE_WORKER: 6,
    FaultKind.PAUSE_WORKER: 6,
    FaultKind.STALL_WORKER: 7,
    FaultKind.CUT_WORKER: 7,
    FaultKind.BLOCK_LOOP: 4,
    FaultKind.MOVE_CLOCK: 4,
    FaultKind.KILL_REDIS: 4,
    FaultKind.RESTART_REDIS: 2,
    FaultKind.SLOW_LOADING: 2,
    FaultKind.STALL_REDIS: 4,
    FaultKind.FULL_REDIS: 3,
    FaultKind.READ_ONLY_REDIS: 3,
    FaultKind.UNSAVED_REDIS: 3,
    FaultKind.FLUSH_SCRIPTS: 4,
    FaultKind.KILL_CLIENTS: 4,
    FaultKind.PAUSE_CLIENTS: 4,
    FaultKind.LOSE_MESSAGES: 7,
    FaultKind.DOUBLE_MESSAGES: 7,
    FaultKind.REORDER_MESSAGES: 5,
}
"""How often each kind stands in about 100 faults."""

WITH_SENTINEL: Mapping[FaultKind, int] = {
    FaultKind.KILL_WORKER: 22,
    FaultKind.TERMINATE_WORKER: 8,
    FaultKind.PAUSE_WORKER: 10,
    FaultKind.BLOCK_LOOP: 6,
    FaultKind.MOVE_CLOCK: 4,
    FaultKind.FAIL_OVER: 10,
    FaultKind.FLUSH_SCRIPTS: 5,
    FaultKind.KILL_CLIENTS: 10,
    FaultKind.PAUSE_CLIENTS: 5,
    FaultKind.LOSE_MESSAGES: 4,
    FaultKind.DOUBLE_MESSAGES: 4,
    FaultKind.REORDER_MESSAGES: 2,
}
"""The same for a deployment with Sentinel."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the schedule."""

    at_s: float
    """Seconds after the beginning."""
    kind: FaultKind
    longer_than_lease: bool
    """Whether a pause, stall or cut outlasts the lease."""
    victim: float
    """From 0 to 1: which of the live workers it meets."""


def schedule(seed: int, minutes: float, *, per_minute: float, sentinel: bool = False) -> list[Fault]:
    """The faults in the order of time. Every kind of the table occurs before any kind is drawn again.

    >>> schedule(7, 1, per_minute=20) == schedule(7, 1, per_minute=20)
    True
    """
    chance = random.Random(seed)
    weights = WITH_SENTINEL if sentinel else WEIGHTS
    count = max(1, round(minutes * per_minute))
    kinds: list[FaultKind] = []
    while len(kinds) < count:
        once = list(weights)
        others = [kind for kind, weight in weights.items() for _ in range(weight - 1)]
        chance.shuffle(once)
        chance.shuffle(others)
        kinds += once + others
    times = sorted(chance.uniform(0, minutes * 60) for _ in range(count))
    return [
        Fault(at_s, kind, chance.random() < 0.5, chance.random())
        for at_s, kind in zip(times, kinds, strict=False)
    ]
