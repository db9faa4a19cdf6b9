"""The backlog: the only place that reads the broker's queues, to find when the oldest message was sent.

Each of our messages has the time of its sending in `wake_us`. A run whose last message is younger than the
oldest one still waits in the queue; a run whose message is older has lost it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from openagents_worker.errors import RedisUnreachable
from openagents_worker.jsontext import loads
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.redis_url import as_redis
from openagents_worker.store.client import AsyncStore, Cell

__all__ = ["EMPTY", "Backlog", "oldest_of", "priorities_are_kombus"]

EMPTY = 2**53 - 1
"""The result for an empty queue: later than every message. Fits a Lua number."""

# kombu's Redis transport keeps a list per priority step, pushes at its left and pops at its right.
SEPARATOR = "\x06\x16"
PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SUFFIXES = tuple(f"{SEPARATOR}{step}" if step else "" for step in PRIORITY_STEPS)
OLDEST_READ = 16  # messages per list; several, because messages of foreign producers have no time


class Backlog:
    """Reads the oldest messages of queues on a Redis broker."""

    def __init__(self, broker_url: str, *, key_prefix: str = "") -> None:
        """`key_prefix` is kombu's `global_keyprefix`. The queues of a broker other than Redis cannot be
        read."""
        self._prefix = key_prefix
        url = as_redis(broker_url)
        self._store = AsyncStore(Cell(url), max_connections=1) if url is not None else None

    async def oldest_us(self, queue: str) -> int | None:
        """When the oldest message of a queue and its wake-up queue was sent, in µs.

        `EMPTY` without messages; None if the queue cannot be read.
        """
        if self._store is None:
            return None
        names = (queue, f"{queue}{WAKE_SUFFIX}")
        lists = [f"{self._prefix}{name}{step}" for name in names for step in PRIORITY_SUFFIXES]
        try:
            async with self._store.redis.pipeline(transaction=False) as pipe:
                for name in lists:
                    pipe.lrange(name, -OLDEST_READ, -1)
                found: list[list[str]] = await self._store.ask(lambda _: pipe.execute())
        except RedisUnreachable:
            return None
        return oldest_of(message for messages in found for message in messages)

    async def aclose(self) -> None:
        if self._store is not None:
            await self._store.close()


def priorities_are_kombus(options: Mapping[str, Any]) -> bool:
    """Whether a Redis broker with these transport options uses the list names that are read here."""
    steps = {0, *(options.get("priority_steps") or PRIORITY_STEPS)}
    return options.get("sep", SEPARATOR) == SEPARATOR and steps <= set(PRIORITY_STEPS)


def oldest_of(messages: Iterable[str]) -> int | None:
    """The earliest `wake_us` of kombu messages, in µs; `EMPTY` without messages, None if none has a time."""
    times, any_message = [], False
    for message in messages:
        any_message = True
        try:
            times.append(int(loads(message)["headers"]["wake_us"]))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            continue  # the message of a foreign producer
    if times:
        return min(times)
    return None if any_message else EMPTY
