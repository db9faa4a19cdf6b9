"""End notices. The only place that decides when a message that only notifies Celery of an end is delivered.

Whoever cancels a thousand runs that wait causes two thousand messages: the runs' own, which stand in the
queue, and a notification of each end, which would be taken first. Neither may keep a new run waiting. So
notifications take a quarter of the free slots at most; the others wait here, in memory: Redis still lists
them as sent, and the rescue loop sends again what a worker had that died. And a message that another one of
the same run has replaced is dropped before a task is made of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.broker import RUN_ENDED, Taken
from openagents_worker.store.client import Store
from openagents_worker.store.states import STATES
from openagents_worker.telemetry import get_logger

__all__ = ["EndNotices"]

log = get_logger(__name__)

SHARE_OF_FREE_SLOTS = 4  # one in so many, and one at least
MOST_WAITING = 2_000  # messages, of 2 KB each; what is dropped beyond is sent again, ever less often
OVER = frozenset(state.value for state, facts in STATES.items() if facts.is_terminal)
OLD_US = 200_000  # a message that was taken sooner after its sending has not been replaced: nobody is asked


class EndNotices:
    """The messages of one worker's consumer, in its main thread."""

    def __init__(
        self,
        *,
        store: Callable[[], Store],
        free_slots: Callable[[], int],
        in_hand: Callable[[], int],
        deliver: Callable[[dict[str, Any], str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`free_slots` and `in_hand` count what can be begun now, and the notifications that have been."""
        self._store, self._clock = store, clock
        self._free_slots, self._in_hand, self._deliver = free_slots, in_hand, deliver
        self._waiting: deque[Taken] = deque()
        self._is_delivering = False
        self._reads_on = False
        """Messages were taken of which nothing was begun: behind them may stand a run that waits."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def sift(self, taken: list[Taken]) -> list[Taken]:
        """Those of the messages that are to be delivered now."""
        now: list[Taken] = []
        for message, queue in self._without_replaced(taken):
            if not _headers(message).get(RUN_ENDED):
                now.append((message, queue))
            elif len(self._waiting) < MOST_WAITING:
                self._waiting.append((message, queue))
        self._reads_on = len(now) < len(taken)
        for _ in range(self._room(beside=len(now))):
            now.append(self._waiting.popleft())
        return now

    def deliver_more(self) -> None:
        """There may be room again."""
        if self._is_delivering or not self._waiting:
            return
        self._is_delivering = True
        try:
            while self._room() > 0:
                self._deliver(*self._waiting.popleft())
            self._reads_on = False
        finally:
            self._is_delivering = False

    def _room(self, *, beside: int = 0) -> int:
        """How many of those that wait can be delivered now; `beside` other messages are about to be."""
        in_hand, free = self._in_hand(), self._free_slots() - beside
        most = 1 if self._reads_on else max((free + in_hand) // SHARE_OF_FREE_SLOTS, 1)
        return max(min(most - in_hand, free, len(self._waiting)), 0)

    def _without_replaced(self, taken: list[Taken]) -> list[Taken]:
        now_us = self._clock() * 1_000_000
        old = [
            (index, *sent)
            for index, (message, queue) in enumerate(taken)
            if (sent := _sent(message, queue)) is not None and now_us - sent[2] > OLD_US
        ]
        if not old:
            return taken
        replaced = self._replaced(old)
        return [each for index, each in enumerate(taken) if index not in replaced]

    def _replaced(self, old: Sequence[tuple[int, str, str, int]]) -> set[int]:
        """Which of these messages (index, queue, run, time of its sending) nobody waits for any more.

        Redis knows when the latest message of a run was sent, for as long as somebody waits for one.
        """

        def ask(redis: Any) -> Any:
            pipe = redis.pipeline(transaction=False)
            for _, queue, run_id, _ in old:
                pipe.zscore(store.keys("sent", queue), run_id)
                pipe.hmget(store.keys("run", run_id), "state", "untold")
            return pipe.execute()

        try:
            store = self._store()
            answers = store.ask(ask)
        except OpenAgentsError as error:
            log.debug("messages.not_sifted", error=error.message)
            return set()
        found: set[int] = set()
        for (index, _, _, sent_us), sent_last, (state, untold) in zip(
            old, answers[::2], answers[1::2], strict=True
        ):
            is_over = sent_last is None and untold is None and state in OVER
            if is_over or (sent_last is not None and float(sent_last) > sent_us):
                found.add(index)
        return found


def _headers(message: dict[str, Any]) -> dict[str, Any]:
    headers = message.get("headers")
    return headers if isinstance(headers, dict) else {}


def _sent(message: dict[str, Any], queue: str) -> tuple[str, str, int] | None:
    """Queue, run and time of sending, in microseconds, of a message of ours."""
    headers = _headers(message)
    run_id, sent_us = headers.get("id"), headers.get("wake_us")
    if not (
        isinstance(run_id, str) and isinstance(sent_us, str) and sent_us.isdecimal() and len(sent_us) < 18
    ):
        return None
    return queue.removesuffix(".wake"), run_id, int(sent_us)
