"""Events of tasks. The only place that says how soon a worker tells Celery's watchers (Flower) of its tasks.

Celery publishes after every turn of its consumer's loop, which at a few hundred tasks a second is most of
what that thread does. Nobody looks that often: ours go out in batches.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps

__all__ = ["EventBatches"]

BATCH_S = 0.1  # Flower shows a task this much later
MOST_EVENTS = 500  # a message of some 100 KB; Celery's own limit is 24


class EventBatches(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """A step of the consumer: collects the events of tasks for a moment before they are published."""

    requires = ("celery.worker.consumer.events:Events",)

    _publish_last: Any = None
    """Publishes what is left when the worker ends."""

    def start(self, parent: Any) -> None:
        """Called again with each new connection, which has a dispatcher of its own."""
        hub, dispatcher = parent.hub, parent.event_dispatcher
        if hub is None or not getattr(dispatcher, "on_send_buffered", None):
            return
        dispatcher.buffer_limit = MOST_EVENTS
        waiting = False

        def collect() -> None:  # in whatever thread sends an event
            nonlocal waiting
            if not waiting:
                waiting = True
                hub.call_soon(hub.call_later, BATCH_S, publish)

        def publish() -> None:
            nonlocal waiting
            waiting = False
            dispatcher.flush()

        def publish_last(_: Any) -> None:
            if parent.event_dispatcher is dispatcher:
                dispatcher.flush()

        dispatcher.on_send_buffered = collect
        hub.on_close.discard(self._publish_last)
        self._publish_last = publish_last
        hub.on_close.add(publish_last)
