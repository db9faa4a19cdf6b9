"""End notices. The only place that decides when a message that only notifies Celery of an end is delivered.

Whoever cancels a thousand runs that wait causes two thousand messages: the runs' own, which stand in the
queue, and a notification of each end, which would be taken first. Neither may keep a new run waiting. So
notifications take a quarter of the free slots at most; the others wait here, in memory: Redis still lists
them as sent, and the rescue loop sends again what a worker had that died. And a message that another one of
the same run has replaced is dropped before a task is made of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from openagents_worker.errors import OpenAgentsError
from openagents_worker.producer.kombu_redis import RUN_ENDED, Taken
from openagents_worker.store.client import Store
from openagents_worker.store.scripts import replaced
from openagents_worker.telemetry.logs import get_logger

__all__ = ["EndNotices"]

log = get_logger(__name__)

SHARE_OF_FREE_SLOTS = 4  # one in so many, and one at least
MOST_WAITING = 2_000  # messages, of 2 KB each; what is dropped beyond is sent again, ever less often
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
        self._waiting: dict[tuple[str, str], Taken] = {}
        """By queue and run, in order of arrival: what was sent again takes the place of the first."""
        self._is_delivering = False
        self._reads_on = False
        """Messages were taken of which nothing was begun: behind them may stand a run that waits."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def sift(self, taken: list[Taken]) -> list[Taken]:
        """Those of the messages that are to be delivered now; notifications wait for `deliver_more`.

        With none, nothing stands behind those before.
        """
        begun: list[Taken] = []
        for message, queue in taken:
            sent = _sent(message, queue)
            if sent is None or not _is_notification(message):
                begun.append((message, queue))
            elif sent[:2] in self._waiting or len(self._waiting) < MOST_WAITING:
                self._waiting[sent[:2]] = message, queue
        now = self._without_replaced(begun)
        self._reads_on = len(now) < len(taken)
        return now

    def deliver_more(self) -> None:
        """There may be room again."""
        if self._is_delivering or not self._waiting:
            return
        self._is_delivering = True
        try:
            while (room := self._room()) > 0:
                for message, queue in self._next(room):
                    self._deliver(message, queue)
        finally:
            self._is_delivering = False

    def note_room(self) -> None:
        """A task has ended: deliver more, and from the next one on as if nothing stood behind."""
        self.deliver_more()
        self._reads_on = False

    def _room(self) -> int:
        """How many of those that wait can be delivered now."""
        in_hand, free = self._in_hand(), self._free_slots()
        most = 1 if self._reads_on else max((free + in_hand) // SHARE_OF_FREE_SLOTS, 1)
        return max(min(most - in_hand, free, len(self._waiting)), 0)

    def _next(self, most: int) -> list[Taken]:
        """So many of those that wait, or fewer; none when nothing waits any more."""
        found: list[Taken] = []
        while most > 0 and not found and self._waiting:
            found = self._without_replaced([self._waiting.pop(run) for run in [*islice(self._waiting, most)]])
        return found

    def _without_replaced(self, taken: list[Taken]) -> list[Taken]:
        """Without the messages that nobody waits for any more.

        Redis knows when the latest message of a run was sent, for as long as somebody waits for one.
        """
        now_us = self._clock() * 1_000_000
        old = [
            (index, sent)
            for index, (message, queue) in enumerate(taken)
            if (sent := _sent(message, queue)) is not None and now_us - sent[2] > OLD_US
        ]
        if not old:
            return taken
        words = [
            str(word)
            for at, sent in old
            for word in (*sent, "ended" if _is_notification(taken[at][0]) else "")
        ]
        try:
            found = self._store().run(replaced(messages=words))
        except OpenAgentsError as error:
            log.debug("messages.not_sifted", error=error.message)
            return taken
        gone = {index for number, (index, _) in enumerate(old) if number in found}
        return [each for index, each in enumerate(taken) if index not in gone]


def _is_notification(message: dict[str, Any]) -> bool:
    return bool(_headers(message).get(RUN_ENDED))


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
