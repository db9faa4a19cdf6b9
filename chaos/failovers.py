"""When a master and its replica may have lost data: seen from outside, whoever replaced the master."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import redis

__all__ = ["FailoverWatch", "Failovers", "Moment"]

LOOK_S = 0.1
TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What two Redis servers say of themselves at one moment: `INFO replication`, or None (no answer)."""

    at: float
    replication: Sequence[dict[str, Any] | None]

    @property
    def masters(self) -> int:
        return sum(each is not None and each["role"] == "master" for each in self.replication)

    @property
    def history(self) -> str | None:
        """The id of the replication that all servers follow. None: they do not all follow one master.

        Redis gives every master that takes over a new one (`master_replid`).
        """
        answers = [each for each in self.replication if each is not None]
        if len(answers) < len(self.replication) or self.masters != 1:
            return None
        if any(each["role"] == "slave" and each["master_link_status"] != "up" for each in answers):
            return None
        ids = {str(each["master_replid"]) for each in answers}
        return ids.pop() if len(ids) == 1 else None


@dataclass(slots=True)
class Failovers:
    """From when to when it was not certain that the master had every write that was acknowledged.

    Such a time begins when all servers were last seen following one master, and ends when they are seen
    following another one. It is one, too, if two servers called themselves master in between.
    """

    losses: list[tuple[float, float]] = field(default_factory=list)
    _settled_at: float | None = None
    _history: str | None = None
    _two_masters: bool = False

    def add(self, moment: Moment) -> None:
        """Take what was seen at a moment later than the last one."""
        self._two_masters |= moment.masters > 1
        history = moment.history
        if history is None:
            return
        if self._settled_at is not None and (history != self._history or self._two_masters):
            self.losses.append((self._settled_at, moment.at))
        self._settled_at, self._history, self._two_masters = moment.at, history, False

    def until(self, now: float) -> list[tuple[float, float]]:
        """All of them. One that has not ended counts up to now."""
        if self._settled_at is None or not self._two_masters:
            return list(self.losses)
        return [*self.losses, (self._settled_at, now)]


class FailoverWatch:
    """Looks at the servers ten times a second, from a thread of its own, until the `with` block ends."""

    def __init__(self, ports: Sequence[int], password: str) -> None:
        self._clients = [
            redis.Redis(port=port, password=password, socket_timeout=TIMEOUT_S, decode_responses=True)
            for port in ports
        ]
        self._failovers = Failovers()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="failovers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for client in self._clients:
            client.close()

    @property
    def losses(self) -> list[tuple[float, float]]:
        """From when to when Redis may have lost data, in seconds of `time.monotonic`."""
        with self._lock:
            return self._failovers.until(time.monotonic())

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            moment = Moment(time.monotonic(), [self._replication(client) for client in self._clients])
            with self._lock:
                self._failovers.add(moment)

    def _replication(self, client: redis.Redis) -> dict[str, Any] | None:
        try:
            return dict(client.info("replication"))
        except redis.RedisError:
            return None
