"""Task events: the only place that sets how soon a worker publishes Celery's task events (for Flower).

Celery publishes events after every iteration of its consumer's loop; at a few hundred tasks a second this
takes most of that thread's time. Here events are published in batches of `BATCH_S`.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

__all__ = ["EventBatches"]

BATCH_S = 0.1  # the delay until Flower shows a task
MAX_EVENTS = 500  # a message of about 100 KB; Celery's default is 24


class EventBatches(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A consumer bootstep: collects task events for `BATCH_S` before they are published."""

    requires = ("celery.worker.consumer.events:Events",)

    _publish_on_close: Any = None
    """Publishes the remaining events when the worker ends."""

    def start(self, parent: Any) -> None:
        """Called for each new connection, which has a new dispatcher."""
        hub, dispatcher = parent.hub, parent.event_dispatcher
        if hub is None or not getattr(dispatcher, "on_send_buffered", None):
            return
        dispatcher.buffer_limit = MAX_EVENTS
        is_scheduled = False

        def collect() -> None:  # called in the thread that sends an event
            nonlocal is_scheduled
            if not is_scheduled:
                is_scheduled = True
                hub.call_soon(hub.call_later, BATCH_S, publish)

        def publish() -> None:
            nonlocal is_scheduled
            is_scheduled = False
            dispatcher.flush()

        def publish_on_close(_: Any) -> None:
            if parent.event_dispatcher is dispatcher:
                dispatcher.flush()

        dispatcher.on_send_buffered = collect
        hub.on_close.discard(self._publish_on_close)
        self._publish_on_close = publish_on_close
        hub.on_close.add(publish_on_close)
