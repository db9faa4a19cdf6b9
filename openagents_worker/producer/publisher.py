"""Publisher. The only place that makes a Celery app and publishes the messages of runs.

A message is only a wake-up: it contains ids, and the request is in the record of the run. Therefore
publishing may fail: the run is accepted anyway, and the rescue loop of a worker sends the message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import kombu
from celery import Celery
from kombu import pools
from kombu.exceptions import SerializationError
from kombu.transport import redis
from kombu.utils.scheduling import round_robin_cycle

from openagents_worker.errors import BrokerConfigError, RedisNoPermission
from openagents_worker.producer.app_binding import (
    AppBinding,
    AppKind,
    attach_binding,
    binding_of,
    find_binding,
)
from openagents_worker.producer.message_names import RESUME_RUN, RUN_AGENT, RUN_ENDED
from openagents_worker.producer.queue_checks import queue_to_send_to
from openagents_worker.producer.redis_transport import ANSWER_TIMEOUT_S as BROKER_ANSWER_TIMEOUT_S
from openagents_worker.producer.redis_transport import TRANSPORTS
from openagents_worker.producer.results import NO_RESULTS
from openagents_worker.producer.task_options import parse_task_options
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.redaction import safe_url
from openagents_worker.redis_url import (
    CeleryAddress,
    RedisAddress,
    Sentinels,
    address_of,
    is_redis_url,
)
from openagents_worker.settings import Settings
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.permission import is_permission_error
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import span

__all__ = [
    "RESUME_RUN",
    "RUN_AGENT",
    "WakesFirst",
    "close_producers",
    "declared_queue",
    "make_app",
    "publishing_connection",
    "send_first",
    "send_wakes",
    "wake_queue",
]

CONNECT_TIMEOUT_S = 1.0  # with one retry, a broker that does not answer is noticed within three seconds
ANSWER_TIMEOUT_S = 1.5
MAX_PRODUCERS = 10
SHOWN_CHARS = 200
RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

log = get_logger(__name__)


def make_app(settings: Settings) -> Celery:
    """A Celery app with the configuration of this library. It is not the current app and opens no
    connection."""
    app = Celery("openagents", set_as_current=False)
    if settings.result_backend is None:
        app.backend_cls = NO_RESULTS
    broker, backend = _broker(settings.broker_url), _backend(settings.result_backend)
    app.conf.update(
        broker_url=broker.url,
        broker_use_ssl=broker.use_ssl or False,
        result_backend=backend.url if backend is not None else None,
        redis_backend_use_ssl=backend.use_ssl if backend is not None else None,
        result_backend_transport_options=backend.transport_options if backend is not None else {},
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_default_queue=settings.queue,
        task_create_missing_queues=True,
        task_ignore_result=settings.result_backend is None,
        task_store_errors_even_if_ignored=False,
        task_send_sent_event=True,
    )
    app.conf.broker_transport_options = _transport_options(_driver(app), broker.transport_options)
    attach_binding(app, AppBinding(AppKind.PRODUCER, settings))
    return app


def _broker(url: str) -> CeleryAddress:
    if not is_redis_url(url):
        return CeleryAddress(url)
    address = address_of(url)
    return address.as_broker() if isinstance(address, RedisAddress) else _by_sentinels(address)


def _backend(url: str | None) -> CeleryAddress | None:
    if url is None:
        return None
    if not is_redis_url(url):
        return CeleryAddress(url)
    address = address_of(url)
    return address.as_backend() if isinstance(address, RedisAddress) else _by_sentinels(address)


def _by_sentinels(sentinels: Sentinels) -> CeleryAddress:
    """Celery's URL and transport options for sentinels."""
    # A dead machine does not answer at all: without a limit, a worker would wait for minutes.
    connecting = {"socket_connect_timeout": CONNECT_TIMEOUT_S}
    options = sentinels.celery_options(**connecting, socket_timeout=ANSWER_TIMEOUT_S)
    return CeleryAddress(sentinels.celery_url, None, {**options, **connecting})


class WakesFirst(round_robin_cycle):
    """The order in which kombu reads the queues of a worker: wake-ups of started runs before new runs."""

    def consume(self, n: int) -> list[str]:
        """The queues in the order in which kombu reads them."""
        return sorted(self.items[:n], key=lambda queue: not queue.endswith(WAKE_SUFFIX))


def wake_queue(queue: str) -> str:
    """The queue for the wake-ups of runs of `queue`. It is separate, so that they do not wait in the
    backlog."""
    return queue + WAKE_SUFFIX


def declared_queue(app: Celery, name: str) -> kombu.Queue:
    """How the app declares this queue. If it does not: as Celery declares a queue that is missing.

    Workers and producers must agree: RabbitMQ refuses a second, different declaration (406), which ends a
    worker.
    """
    queues = app.amqp.queues
    try:
        queue: kombu.Queue = queues[name]
    except KeyError:  # the app has `task_create_missing_queues` off
        queue = queues.add(queues.new_missing(name))
    return queue


def send_first(app: Celery, run: Wake) -> bool:
    """Publish the first message of a run. If the broker cannot be reached: one warning, and False.

    With `task_always_eager` the run is executed in this process, as by `send_wakes`.
    """
    if (execute := _eager(app)) is not None:
        return bool(execute([run]))
    return _publish(app, [run], lambda wake: _first_message(wake, _queue_of(app, wake))) == 1


def send_wakes(app: Celery, wakes: Iterable[Wake]) -> int:
    """Publish wake-ups over one connection. Returns how many were sent; there is one warning for the rest.

    With `task_always_eager` there is no consumer: the runs are executed in this process, if it can do that.
    """
    if (execute := _eager(app)) is not None:
        return int(execute(wakes))
    return _publish(app, list(wakes), lambda wake: _wake_message(wake, _queue_of(app, wake)))


def _eager(app: Celery) -> Callable[[Iterable[Wake]], int] | None:
    """With `task_always_eager`: the function that executes runs in this process. None: messages are sent."""
    return getattr(app.tasks.get(RUN_AGENT), "execute_wakes", None) if app.conf.task_always_eager else None


def close_producers(app: Celery) -> None:
    """Close this process's publishing connections to the app's broker."""
    binding = find_binding(app)
    pool = binding.producers.pop(os.getpid(), None) if binding is not None else None
    if pool is not None:
        pool.force_close_all()
        pool.connections.force_close_all()


SendTaskArguments = Mapping[str, Any]
"""Keyword arguments of `Celery.send_task`."""


def _first_message(run: Wake, queue: str) -> SendTaskArguments:
    ids = {"run_id": run.run_id, "agent_id": run.agent_id, "session_id": run.session_id}
    return _message(run, RUN_AGENT, queue, [ids])


def _queue_of(app: Celery, run: Wake) -> str:
    return queue_to_send_to(run.queue, binding_of(app).settings, run.run_id)


def _wake_message(wake: Wake, queue_of_run: str) -> SendTaskArguments:
    queue = wake_queue(queue_of_run)
    if wake.attempt == 0:
        return _first_message(wake, queue)
    return _message(wake, RESUME_RUN, queue, [wake.run_id, wake.checkpoint_id])


def _message(run: Wake, name: str, queue: str, args: Sequence[Any]) -> SendTaskArguments:
    """The message of a run: ids for the worker, readable ids for Flower, the options of the submission."""
    task_options = parse_task_options(run.canvas)
    return {
        **task_options,
        "name": name,
        "args": args,
        "task_id": run.run_id,
        "root_id": task_options.get("root_id") or run.run_id,
        "queue": queue,
        "headers": {
            **task_options.get("headers", {}),
            "wake_us": str(run.sent_us),
            "run_format": WRITTEN,
            **({RUN_ENDED: 1} if run.is_ended else {}),
        },
        "argsrepr": _readable_ids(run),
        "kwargsrepr": "{}",
        "serializer": "json",
        # Set explicitly, because otherwise the settings of the app for all tasks apply.
        "priority": task_options.get("priority"),
        "expires": None,
        "time_limit": None,
        "soft_time_limit": None,
    }


def _readable_ids(run: Wake) -> str:
    """The ids of the run, cut to 200 characters each: a damaged record may contain megabytes."""
    return f"agent={run.agent_id[:SHOWN_CHARS]} session={run.session_id[:SHOWN_CHARS]} run={run.run_id}"


def _publish(app: Celery, runs: Sequence[Wake], message_of: Callable[[Wake], SendTaskArguments]) -> int:
    """Publish until the first failure, because the broker would reject the other messages, too."""
    sent = 0
    try:
        if runs:
            with (
                span("openagents.publish", {"messaging.batch.message_count": len(runs)}),
                _producers(app).acquire(block=True, timeout=ANSWER_TIMEOUT_S) as producer,
            ):
                for run in runs:
                    _send_one(app, producer, run, message_of)
                    sent += 1
    except Exception as error:  # noqa: BLE001  # any error of the broker: the run is accepted anyway
        log.warning(
            "broker.unreachable",
            run_id=runs[sent].run_id,
            unsent=len(runs) - sent,
            error=f"{type(error).__name__}: {error}",
            hint=f"the runs are accepted; a worker will send the messages{_condition(error)}",
        )
    return sent


def _condition(error: Exception) -> str:
    """The end of the hint. An error of kombu has the error of redis-py as its cause."""
    if any(each is not None and is_permission_error(each) for each in (error, error.__cause__)):
        return f". {RedisNoPermission.code}: config/acl/producer.acl lists the permissions of a producer"
    return " when the broker can be reached"


INVALID_MESSAGE_ERRORS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
    SerializationError,
)
"""The exceptions of Celery and kombu for a message that cannot be created, not for a broker failure."""


def _send_one(app: Celery, producer: Any, run: Wake, message_of: Callable[[Wake], SendTaskArguments]) -> None:
    """Send the message of a run. If its stored task options are not valid, send it without them."""
    try:
        _send(app, producer, message_of(run))
    except INVALID_MESSAGE_ERRORS as error:
        if not run.canvas:
            raise
        log.error(
            "run.options_left_out",
            run_id=run.run_id,
            error=f"{type(error).__name__}: {error}"[:SHOWN_CHARS],
            hint="linked tasks are not called; the field canvas of the record contains the options",
        )
        _send(app, producer, message_of(replace(run, canvas="")))


def _send(app: Celery, producer: Any, message: SendTaskArguments) -> None:
    # ignore_result is only in the header: as an option, Celery would subscribe to the result backend here.
    ignored = app.conf.result_backend is None or bool(app.conf.task_ignore_result)
    app.send_task(
        **{**message, "headers": {**message["headers"], "ignore_result": ignored}},
        router=_QueueOfRunRouter(app),
        producer=producer,
        ignore_result=True,
        add_to_parent=False,
        retry=True,
        retry_policy=RETRY_ONCE,
    )


class _QueueOfRunRouter:
    """Routes a message to the queue of the run, independent of the `task_routes` of the app."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def route(self, options: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        return {**options, "queue": declared_queue(self._app, options["queue"])}


def _producers(app: Celery) -> Any:
    """The publishing connections of the app. A forked process makes new ones, because it must not share
    sockets."""
    # There is no lock, because another thread could hold it during a fork. The first pool is kept.
    by_process = binding_of(app).producers
    found = by_process.get(os.getpid())
    if found is None:
        connections = publishing_connection(app).Pool(MAX_PRODUCERS)
        made = pools.ProducerPool(connections, limit=MAX_PRODUCERS)  # type: ignore[no-untyped-call]  # kombu
        found = by_process.setdefault(os.getpid(), made)
    return found


def publishing_connection(app: Celery) -> Any:
    """A new connection with timeouts for publishing. A consumer blocks for long, so it must not use them."""
    options = {**app.conf.broker_transport_options, "max_retries": 0}
    driver = _driver(app)
    if driver == "redis":
        options |= {"socket_timeout": ANSWER_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    elif driver == "amqp":
        options |= {"read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S}
    connection = app.connection_for_write(connect_timeout=CONNECT_TIMEOUT_S, transport_options=options)
    # kombu has already read the alias of the transport here, which decides whether it uses TLS.
    alias = connection.transport_cls
    if isinstance(alias, str):
        connection.transport_cls = TRANSPORTS.get(alias, alias)
    return connection


def _driver(app: Celery) -> str:
    """The kind of the app's broker: `redis` (also Valkey, Sentinel), `amqp` … Raises `BrokerConfigError`."""
    try:
        return str(app.connection_for_write().transport.driver_type)
    except (KeyError, ImportError) as error:
        url = app.conf.broker_write_url or app.conf.broker_url or ""
        raise BrokerConfigError(
            f"Celery cannot use the broker {safe_url(str(url))}: {error}",
            hint="set OPENAGENTS_BROKER_URL to a broker that Celery supports, and install its client library",
        ) from error


def _transport_options(driver: str, url_options: Mapping[str, Any]) -> dict[str, Any]:
    """The transport options for the app. `url_options` come from the URL of the broker.

    The timeouts of the URL can only shorten the default timeouts.
    """
    if driver != "redis":
        return dict(url_options)
    if "client_name" in url_options and "client_name" not in redis.Channel.from_transport_options:
        raise BrokerConfigError(
            f"the option client_name of the broker URL requires a newer kombu than {kombu.__version__}",
            hint="pip install --upgrade kombu, or remove the option from the URL",
        )
    options = {
        "queue_order_strategy": f"{__name__}:WakesFirst",
        "visibility_timeout": 24 * 3600,  # with early acknowledgement it affects only prefetched messages
        "socket_keepalive": True,
        "health_check_interval": 10,
        **url_options,
    }
    if "socket_timeout" in url_options:
        options["socket_timeout"] = min(url_options["socket_timeout"], BROKER_ANSWER_TIMEOUT_S)
    return options
