"""A notice for a run that has not started. The only place that watches, in a thread, why a run waits."""

from __future__ import annotations

import _thread
import threading
from types import TracebackType
from typing import Self

from openagents_worker.cli.terminal import err, joined, styled
from openagents_worker.errors import OpenAgentsError
from openagents_worker.events import RunEvent
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.waiting_reason import read_waiting_reason

__all__ = ["NotStarted"]

CHECK_INTERVAL_S = 3.0  # a worker with a free slot starts a run within milliseconds
WAITING_STATES = (RunState.QUEUED, RunState.WAITING_SESSION)


class NotStarted:
    """A context manager that prints to standard error why the run waits.

    It prints the reason after three seconds without a start, and again when the reason changes. It stops when
    `event_shown` gets an event of an attempt, or when the block ends.
    """

    def __init__(self, client: Client, run_id: str, *, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self._client = client
        self._run_id = run_id
        self._check_interval_s = check_interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"why {run_id} waits", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def event_shown(self, event: RunEvent) -> None:
        """Stop printing if this event shows that the run has started or ended."""
        if event.name == "run.attempt_started" or event.is_terminal:
            self._stop.set()

    def _main(self) -> None:
        printed = None
        while not self._stop.wait(self._check_interval_s):
            text = self._waiting_reason()
            if text is not None and text != printed and not self._stop.is_set():
                try:
                    err(joined(styled("waiting: ", fg="yellow", bold=True), text))
                except BrokenPipeError:  # the reader of standard error has closed it: stop the command
                    _thread.interrupt_main()
                    return
                printed = text

    def _waiting_reason(self) -> str | None:
        try:
            record = self._client.record(self._run_id)
            if record.state not in WAITING_STATES:
                return None
            waiting = self._client.store.execute(read_waiting_reason(self._client.store.keys, record))
        except OpenAgentsError:  # the thread that watches the run gets the same error and reports it
            return None
        return None if waiting is None else waiting.text
