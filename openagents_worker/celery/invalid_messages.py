"""Refusals. The only place that answers messages which Celery does not let in, and keeps them from ending it.

An unknown task, a body that is no JSON or of another shape, a content type that is not allowed: Celery writes
a line into its log, or its consumer ends by an exception. In a queue of runs such a message was meant to be a
run: where it has an id, whoever sent it finds a failed run under it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps

from openagents_worker.celery.message import EXAMPLE
from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.errors import InvalidInputError, RedisUnreachable, RequestInvalid, text_of
from openagents_worker.jsontext import is_whole
from openagents_worker.producer.broken_items import BrokenItems, Keep
from openagents_worker.producer.client import client_of
from openagents_worker.producer.kombu_redis import Transport
from openagents_worker.producer.publisher import RUN_AGENT, wake_queue
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.redaction import safe_message
from openagents_worker.store.dead_letters import item_as_text
from openagents_worker.store.scripts import put_aside, reject
from openagents_worker.telemetry.logs import get_logger

__all__ = ["invalid_messages_step_of"]

log = get_logger(__name__)

MAX_REASON_CHARS = 500
OF_A_WRONG_SHAPE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What Celery's own code raises when a part of a message is not of the type that it takes for granted."""


def invalid_messages_step_of(host: ProcessHolder) -> type[bootsteps.StartStopStep]:
    """A step of the consumer, for the queues of runs; what lies in others is Celery's alone."""

    class Refusals(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
        requires = ("celery.worker.consumer.connection:Connection",)

        def __init__(self, parent: Any, **_: Any) -> None:
            for name, at in _CALLBACKS.items():
                setattr(parent, name, _answering(host, parent, getattr(parent, name), at))
            parent.create_task_handler = _guarded(host, parent, parent.create_task_handler)

        def start(self, parent: Any) -> None:
            """Called again with each new connection, after it was made and before anything is consumed."""
            transport = parent.connection.transport
            if isinstance(transport, Transport):
                transport.broken = BrokenItems(_keeper(parent), host.settings.key_prefix)

    return Refusals


def _keeper(consumer: Any) -> Keep:
    def keep(where: str, code: str, why: str, item: object) -> None:
        try:
            store = client_of(consumer.app).store
            store.run(put_aside(key=where, code=code, what=why, item=item_as_text(item)))
        except RedisUnreachable as error:
            log.error("message.not_kept", queue=where, error=error.message, item=item_as_text(item))

    return keep


# Where the message, and what is wrong with it, stand among the arguments of Celery's callbacks.
_CALLBACKS = {
    "on_decode_error": (0, 1),
    "on_invalid_task": (1, 2),
    "on_unknown_message": (1, None),
    "on_unknown_task": (1, 2),
}


def _answering(
    host: ProcessHolder, consumer: Any, celerys: Callable[..., Any], at: tuple[int, int | None]
) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        result = celerys(*args)
        message, reason = args[at[0]], None if at[1] is None else args[at[1]]
        if _is_of_runs(host, message):
            _answer(host, consumer, message, reason)
        return result

    return refuse


def _guarded(host: ProcessHolder, consumer: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    def create_task_handler(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        handle = make(*args, **kwargs)

        def on_message(message: Any) -> Any:
            try:
                return handle(message)
            except OF_A_WRONG_SHAPE as error:
                if not _is_of_runs(host, message) or isinstance(error, consumer.connection_errors):
                    raise
                if not message.acknowledged:
                    message.reject_log_error(logging.getLogger(__name__), consumer.connection_errors)
                _answer(host, consumer, message, error)

        return on_message

    return create_task_handler


def _is_of_runs(host: ProcessHolder, message: Any) -> bool:
    queue = (message.delivery_info or {}).get("routing_key")
    return any(queue in (name, wake_queue(name)) for name in host.queues)


def _answer(host: ProcessHolder, consumer: Any, message: Any, reason: object) -> None:
    """A failed run under the message's id, unless it has none or a run of that id is known."""
    task_id, name = _id_of(message), _headers(message).get("task")
    refused = _refusal(name, reason)
    known = None
    if task_id is not None:
        door = reject(
            run_id=task_id,
            queue=str(message.delivery_info["routing_key"]).removesuffix(WAKE_SUFFIX),
            code=refused.code,
            message=refused.message,
            hint=refused.hint or "",
        )
        try:
            known = not client_of(consumer.app).store.run(door)
        except RedisUnreachable as error:
            log.of_run(logging.WARNING, "message.not_answered", run_id=task_id, error=error.message)
    if known is False:
        log.error("run.failed", run_id=task_id, code=refused.code, message=refused.message, attempts=0)
    else:
        log.warning(
            "message.rejected", run_id=task_id, code=refused.code, message=refused.message, known=known
        )


def _refusal(name: object, reason: object) -> InvalidInputError:
    if isinstance(reason, InvalidInputError):  # of the message's size: it was not decompressed
        return reason
    if isinstance(reason, KeyError) and name is not None and reason.args == (name,):
        return RequestInvalid(f"no task is named {name!r}", hint=f"the task of a run is {RUN_AGENT}")
    what = f"{type(reason).__name__}: {text_of(reason)}" if reason is not None else "it names no task"
    return RequestInvalid(
        safe_message(f"the message is none of a task: {what}", MAX_REASON_CHARS),
        hint=f"Celery's protocol 2, content type application/json, {EXAMPLE}",
    )


def _id_of(message: Any) -> str | None:
    """The id under which whoever sent it would look; None when there is none to be read."""
    ids = (_headers(message).get("id"), (message.properties or {}).get("correlation_id"))
    return next((found for found in ids if isinstance(found, str) and found and is_whole(found)), None)


def _headers(message: Any) -> dict[str, Any]:
    return message.headers if isinstance(message.headers, dict) else {}
