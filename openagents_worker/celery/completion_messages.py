"""Completion messages: the only place that delays messages that only notify Celery of the end of a run.

A client that cancels a thousand waiting runs causes two thousand messages: the runs' own messages, which are
in the queue, and a completion message for each end, which would be delivered first. Neither may delay a new
run. So completion messages get at most a quarter of the free slots; the others wait here in memory.
Redis still lists them as wake, so the rescue loop re-sends the messages of a dead worker. A message that was
replaced by a newer one of the same run is dropped before a task is created for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from openagents_worker.celery.kombu_redis import Taken
from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.message_names import RUN_ENDED
from openagents_worker.store.client import Store
from openagents_worker.store.scripts import replaced
from openagents_worker.telemetry.logs import get_logger

__all__ = ["CompletionMessages"]

log = get_logger(__name__)

MAX_SHARE_DIVISOR = 4  # of the slots: a quarter, at least one
MAX_WAITING = (
    2_000  # messages of 2 KB each; more are dropped, and the rescue loop re-sends them with a growing grace
)
CHECK_AFTER_US = 200_000  # younger messages are not checked in Redis: they were not replaced yet


class CompletionMessages:
    """Holds back the completion messages that one consumer has received, until slots are free for them.

    Call all methods in the main thread of the worker.
    """

    def __init__(
        self,
        *,
        store: Callable[[], Store],
        free_slots: Callable[[], int],
        unfinished: Callable[[], int],
        deliver: Callable[[dict[str, Any], str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`free_slots` counts the tasks that can start now; `unfinished` counts the completion messages that
        were delivered and are not done."""
        self._store, self._clock = store, clock
        self._free_slots, self._unfinished, self._deliver = free_slots, unfinished, deliver
        self._waiting: dict[tuple[str, str], Taken] = {}
        """By queue and run id, in order of arrival; a re-sent message replaces the first one."""
        self._is_delivering = False
        self._new_runs_may_follow = False
        """Whether the last fetch had messages that were not started: more messages may wait behind them."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def select_deliverable(self, received: list[Taken]) -> list[Taken]:
        """Return the messages to deliver now. Completion messages are kept here until `deliver_more`.

        An empty list means that the queue is empty.
        """
        to_start: list[Taken] = []
        for message, queue in received:
            wake = _parse_wake(message, queue) if _is_notification(message) else None
            if wake is None:
                to_start.append((message, queue))
            elif wake[:2] in self._waiting or len(self._waiting) < MAX_WAITING:
                self._waiting[wake[:2]] = message, queue
        now = self._without_replaced(to_start)
        self._new_runs_may_follow = len(now) < len(received)
        return now

    def deliver_more(self) -> None:
        """Deliver waiting messages if slots are free."""
        if self._is_delivering or not self._waiting:
            return
        self._is_delivering = True
        try:
            while (deliverable := self._count_deliverable()) > 0:
                for message, queue in self._take_waiting(deliverable):
                    self._deliver(message, queue)
        finally:
            self._is_delivering = False

    def on_task_end(self) -> None:
        """Deliver more after a task has ended; the next calls assume that the queue is empty."""
        self.deliver_more()
        self._new_runs_may_follow = False

    def _count_deliverable(self) -> int:
        """The number of waiting messages that can be delivered now."""
        unfinished, free = self._unfinished(), self._free_slots()
        max_count = 1 if self._new_runs_may_follow else max((free + unfinished) // MAX_SHARE_DIVISOR, 1)
        return max(min(max_count - unfinished, free, len(self._waiting)), 0)

    def _take_waiting(self, max_count: int) -> list[Taken]:
        """Remove and return at most `max_count` waiting messages; empty if none waits."""
        found: list[Taken] = []
        while max_count > 0 and not found and self._waiting:
            found = self._without_replaced(
                [self._waiting.pop(run) for run in [*islice(self._waiting, max_count)]]
            )
        return found

    def _without_replaced(self, received: list[Taken]) -> list[Taken]:
        """The messages without those that a newer message has replaced.

        Redis stores when the latest message of a run was sent, as long as the run waits for a message.
        """
        now_us = self._clock() * 1_000_000
        old = [
            (index, wake)
            for index, (message, queue) in enumerate(received)
            if (wake := _parse_wake(message, queue)) is not None and now_us - wake[2] > CHECK_AFTER_US
        ]
        if not old:
            return received
        arguments = [
            str(argument)
            for at, wake in old
            for argument in (*wake, "ended" if _is_notification(received[at][0]) else "")
        ]
        try:
            found = self._store().run(replaced(messages=arguments))
        except OpenAgentsError as error:
            log.debug("messages.not_sifted", error=error.message)
            return received
        replaced_indexes = {index for number, (index, _) in enumerate(old) if number in found}
        return [each for index, each in enumerate(received) if index not in replaced_indexes]


def _is_notification(message: dict[str, Any]) -> bool:
    return bool(_headers(message).get(RUN_ENDED))


def _headers(message: dict[str, Any]) -> dict[str, Any]:
    headers = message.get("headers")
    return headers if isinstance(headers, dict) else {}


def _parse_wake(message: dict[str, Any], queue: str) -> tuple[str, str, int] | None:
    """The queue, the run id and the send time in µs of a message of our producer; None for other messages."""
    headers = _headers(message)
    run_id, sent_us = headers.get("id"), headers.get("wake_us")
    if not (
        isinstance(run_id, str) and isinstance(sent_us, str) and sent_us.isdecimal() and len(sent_us) < 18
    ):
        return None
    return queue.removesuffix(".wake"), run_id, int(sent_us)
