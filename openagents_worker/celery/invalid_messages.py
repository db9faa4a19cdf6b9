"""Invalid messages: the only place that handles messages which Celery rejects, so that they do not end it.

For an unknown task, an undecodable or malformed body or a forbidden content type, Celery only logs a line, or
its consumer ends with an exception. In a queue of runs such a message was meant to be a run: if it has an id,
its sender finds a failed run under that id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps

from openagents_worker.celery.kombu_redis import Transport
from openagents_worker.celery.message import EXAMPLE
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.errors import InvalidInputError, RedisUnreachable, RequestInvalid, text_of
from openagents_worker.jsontext import is_whole
from openagents_worker.producer.broken_items import BrokenItems, Keep
from openagents_worker.producer.client import client_of
from openagents_worker.producer.publisher import RUN_AGENT, wake_queue
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.redaction import safe_message
from openagents_worker.store.dead_letters import item_as_text
from openagents_worker.store.scripts import put_aside, reject
from openagents_worker.telemetry.logs import get_logger

__all__ = ["invalid_messages_step"]

log = get_logger(__name__)

MAX_REASON_CHARS = 500
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What Celery's own code raises when a part of a message does not have the expected type."""


def invalid_messages_step(holder: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A consumer bootstep for the queues of runs; Celery alone handles other queues."""

    class InvalidMessagesStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = ("celery.worker.consumer.connection:Connection",)

        def __init__(self, parent: Any, **_: Any) -> None:
            for name, positions in _CALLBACKS.items():
                setattr(parent, name, _with_failed_run(holder, parent, getattr(parent, name), positions))
            parent.create_task_handler = _guard_task_handler(holder, parent, parent.create_task_handler)

        def start(self, parent: Any) -> None:
            """Called for each new connection, before a message is consumed."""
            transport = parent.connection.transport
            if isinstance(transport, Transport):
                transport.broken = BrokenItems(_dead_letter_writer(parent), holder.settings.key_prefix)

    return InvalidMessagesStep


def _dead_letter_writer(consumer: Any) -> Keep:
    """A function that stores an undecodable queue item as a dead letter."""

    def keep(where: str, code: str, why: str, item: object) -> None:
        try:
            store = client_of(consumer.app).store
            store.run(put_aside(key=where, code=code, what=why, item=item_as_text(item)))
        except RedisUnreachable as error:
            log.error("message.not_kept", queue=where, error=error.message, item=item_as_text(item))

    return keep


# The positions of the message and of the error in the arguments of Celery's callbacks.
_CALLBACKS = {
    "on_decode_error": (0, 1),
    "on_invalid_task": (1, 2),
    "on_unknown_message": (1, None),
    "on_unknown_task": (1, 2),
}


def _with_failed_run(
    holder: ProcessHolder, consumer: Any, callback: Callable[..., Any], positions: tuple[int, int | None]
) -> Callable[..., Any]:
    """Wrap a callback of Celery's consumer so that it also stores a failed run."""

    def refuse(*args: Any) -> Any:
        result = callback(*args)
        message, reason = args[positions[0]], None if positions[1] is None else args[positions[1]]
        if _is_in_run_queue(holder, message):
            _store_failed_run(holder, consumer, message, reason)
        return result

    return refuse


def _guard_task_handler(holder: ProcessHolder, consumer: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the consumer's task handler so that a malformed message does not end the consumer."""

    def create_task_handler(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        handle = make(*args, **kwargs)

        def on_message(message: Any) -> Any:
            try:
                return handle(message)
            except MALFORMED as error:
                if not _is_in_run_queue(holder, message) or isinstance(error, consumer.connection_errors):
                    raise
                if not message.acknowledged:
                    message.reject_log_error(logging.getLogger(__name__), consumer.connection_errors)
                _store_failed_run(holder, consumer, message, error)

        return on_message

    return create_task_handler


def _is_in_run_queue(holder: ProcessHolder, message: Any) -> bool:
    """Whether the message came from a queue of runs or of their wake-ups."""
    queue = (message.delivery_info or {}).get("routing_key")
    return any(queue in (name, wake_queue(name)) for name in holder.queues)


def _store_failed_run(holder: ProcessHolder, consumer: Any, message: Any, reason: object) -> None:
    """Store a failed run under the message's id, unless it has no id or a run of that id exists."""
    task_id, name = _task_id_of(message), _headers(message).get("task")
    failure = _error_for(name, reason)
    known = None
    if task_id is not None:
        script_call = reject(
            run_id=task_id,
            queue=str(message.delivery_info["routing_key"]).removesuffix(WAKE_SUFFIX),
            code=failure.code,
            message=failure.message,
            hint=failure.hint or "",
        )
        try:
            known = not client_of(consumer.app).store.run(script_call)
        except RedisUnreachable as error:
            log.of_run(logging.WARNING, "message.not_answered", run_id=task_id, error=error.message)
    if known is False:
        log.error("run.failed", run_id=task_id, code=failure.code, message=failure.message, attempts=0)
    else:
        log.warning(
            "message.rejected", run_id=task_id, code=failure.code, message=failure.message, known=known
        )


def _error_for(name: object, reason: object) -> InvalidInputError:
    """The coded error for a message that Celery has rejected for this reason."""
    if isinstance(reason, InvalidInputError):  # the message is too large: it was not decompressed
        return reason
    if isinstance(reason, KeyError) and name is not None and reason.args == (name,):
        return RequestInvalid(
            f"the task {name!r} is not registered", hint=f"the task of a run is {RUN_AGENT}"
        )
    what = f"{type(reason).__name__}: {text_of(reason)}" if reason is not None else "it has no task name"
    return RequestInvalid(
        safe_message(f"the message does not belong to a task of this app: {what}", MAX_REASON_CHARS),
        hint=f"use Celery's message protocol 2, content type application/json, {EXAMPLE}",
    )


def _task_id_of(message: Any) -> str | None:
    """The task id that the sender knows; None if the message has no readable id."""
    ids = (_headers(message).get("id"), (message.properties or {}).get("correlation_id"))
    return next((found for found in ids if isinstance(found, str) and found and is_whole(found)), None)


def _headers(message: Any) -> dict[str, Any]:
    return message.headers if isinstance(message.headers, dict) else {}
