"""What is said of a run that does not start: a thread looks, beside the one that follows the run's events."""

from __future__ import annotations

import _thread
import threading
from types import TracebackType
from typing import Self

from openagents_worker.cli.terminal import err, joined, styled
from openagents_worker.cli.waiting import waiting_of
from openagents_worker.errors import OpenAgentsError
from openagents_worker.events import RunEvent
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client

__all__ = ["NotStarted"]

LOOK_AFTER_S = 3.0  # a worker that is there takes a run in milliseconds
WAITS = (RunState.QUEUED, RunState.WAITING_SESSION)


class NotStarted:
    """Says why the run waits, on standard error: after three seconds without a start, and when that changes.

    It goes on until `saw` is given an event of an attempt, or the block ends.
    """

    def __init__(self, client: Client, run_id: str, *, look_after_s: float = LOOK_AFTER_S) -> None:
        self._client = client
        self._run_id = run_id
        self._look_after_s = look_after_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"why {run_id} waits", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def saw(self, event: RunEvent) -> None:
        """An event of the run has been shown."""
        if event.name == "run.attempt_started" or event.is_terminal:
            self._over.set()

    def _main(self) -> None:
        said = None
        while not self._over.wait(self._look_after_s):
            text = self._why()
            if text is not None and text != said and not self._over.is_set():
                try:
                    err(joined(styled("waiting: ", fg="yellow", bold=True), text))
                except BrokenPipeError:  # whoever read this is gone: nobody watches the run any more
                    _thread.interrupt_main()
                    return
                said = text

    def _why(self) -> str | None:
        try:
            record = self._client.record(self._run_id)
            if record.state not in WAITS:
                return None
            waiting = self._client.store.execute(waiting_of(self._client.store.keys, record))
        except OpenAgentsError:  # who follows the run meets it, too, and says so
            return None
        return None if waiting is None else waiting.text
