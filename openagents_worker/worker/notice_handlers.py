"""Notice handlers: the only place that decides what a worker does with a notice, by the notice's kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from hashlib import sha256

from openagents_worker.errors import RedisUnreachable
from openagents_worker.printable import printable
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.notice import CANCEL, FACT, Notice, NoticeUnreadable, parse_notice
from openagents_worker.store.scripts import confirm_notices
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Leave, background_task

__all__ = ["NoticeHandler", "NoticeHandlers", "confirm_in_redis"]

log = get_logger(__name__)

MAX_REMEMBERED = 1_000  # notices whose second copy, from the box, is not handled again
MAX_LOGGED_CHARS = 200

NoticeHandler = Callable[[Notice], None]


class NoticeHandlers:
    """Calls the handler of each notice. Call all methods on the loop.

    A notice comes over the channel and again with the next heartbeat, from the worker's box. A cancel request
    stays in the box until its run ends, and is handled each time: it has no effect on a run that stops. Any
    other notice is taken out of the box with `confirm`. It is handled once, except a notice of a fact: the
    facts of a later run with the same id have the same numbers, and a number that is known has no effect.
    """

    def __init__(
        self, handlers: Mapping[str, NoticeHandler], *, confirm: Callable[[str], object] = lambda text: None
    ) -> None:
        self._handlers = handlers
        self._confirm = confirm
        self._handled: dict[bytes, None] = {}

    def handle(self, text: str) -> None:
        """Handle a notice. One that is not known or not readable is logged, and stops nothing."""
        try:
            notice = parse_notice(text)
        except NoticeUnreadable as error:
            problem = str(error)
            self._once(text, lambda: _log_refused("control.invalid", text, problem))
            return
        if notice.kind == CANCEL:
            self._call(notice, text)
        elif notice.kind == FACT:
            self._call(notice, text)
            self._confirm(text)
        else:
            self._once(text, lambda: self._call(notice, text))

    def _once(self, text: str, act: Callable[[], None]) -> None:
        """Act at the first copy of the notice, and take every copy out of the box."""
        digest = sha256(text.encode(errors="replace")).digest()  # a text may be long
        if digest not in self._handled:
            self._handled[digest] = None
            if len(self._handled) > MAX_REMEMBERED:
                del self._handled[next(iter(self._handled))]
            act()
        self._confirm(text)

    def _call(self, notice: Notice, text: str) -> None:
        handler = self._handlers.get(notice.kind)
        if handler is None:
            _log_refused("control.unknown_kind", text, f"this worker has no handler for {notice.kind!r}")
            return
        try:
            handler(notice)
        except Exception:  # the next notice must be handled
            log.exception("control.failed", code="control.failed", kind=notice.kind, run_id=notice.run_id)


def _log_refused(code: str, text: str, problem: str) -> None:
    shown = printable(text[:MAX_LOGGED_CHARS])
    log.warning("control.refused", code=code, problem=printable(problem[:MAX_LOGGED_CHARS]), notice=shown)


def confirm_in_redis(
    store: AsyncStore, incarnation: Callable[[], str], *, leave: Leave
) -> Callable[[str], object]:
    """A function that takes a notice out of the box of the current incarnation, in the background."""
    running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no reference to a task

    def confirm(text: str) -> None:
        task = background_task(_confirm(store, incarnation(), text), name="confirm notice", leave=leave)
        running.add(task)
        task.add_done_callback(running.discard)

    return confirm


async def _confirm(store: AsyncStore, incarnation: str, text: str) -> None:
    try:
        await store.run(confirm_notices(incarnation=incarnation, notices=[text]))
    except RedisUnreachable as error:
        log.debug("control.not_confirmed", error=error.message)  # the next heartbeat brings it again
