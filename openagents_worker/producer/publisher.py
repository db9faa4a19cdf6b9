"""The broker, seen from a producer. The only place that makes a Celery app and publishes a run's messages.

A message is only a wake-up: it carries ids, the request waits in the run's record. So publishing may fail:
the run is accepted all the same, and the worker's rescue loop sends what was not.
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

from openagents_worker.addresses import (
    CeleryAddress,
    RedisAddress,
    Sentinels,
    address_of,
    is_redis_url,
)
from openagents_worker.errors import BrokerConfigError, RedisNoPermission
from openagents_worker.producer.app_binding import AppBinding, AppKind, attach_parts, find_parts, parts_of
from openagents_worker.producer.kombu_redis import ANSWER_TIMEOUT_S as BROKER_ANSWER_TIMEOUT_S
from openagents_worker.producer.kombu_redis import RESUME_RUN, RUN_AGENT, RUN_ENDED, TRANSPORTS
from openagents_worker.producer.queue_checks import queue_to_send_to
from openagents_worker.producer.results import NO_RESULTS
from openagents_worker.producer.task_options import options_of
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.redaction import safe_url
from openagents_worker.settings import Settings
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.permission import is_no_permission
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger

__all__ = [
    "RESUME_RUN",
    "RUN_AGENT",
    "WakesFirst",
    "close_producers",
    "make_app",
    "send_first",
    "send_wakes",
    "wake_queue",
]

CONNECT_TIMEOUT_S = 1.0  # with one retry a broker that is away or silent is known within three seconds
ANSWER_TIMEOUT_S = 1.5
MAX_PRODUCERS = 10
SHOWN_CHARS = 200
RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

log = get_logger(__name__)


def make_app(settings: Settings) -> Celery:
    """A Celery app that talks as this library does. It is not the current app, and it opens no connection."""
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
    attach_parts(app, AppBinding(AppKind.PRODUCER, settings))
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
    """Celery wants options beside the URL."""
    # A machine that is gone answers nothing at all: without a limit a worker would wait for it for minutes.
    connecting = {"socket_connect_timeout": CONNECT_TIMEOUT_S}
    options = sentinels.celery_options(**connecting, socket_timeout=ANSWER_TIMEOUT_S)
    return CeleryAddress(sentinels.celery_url, None, {**options, **connecting})


class WakesFirst(round_robin_cycle):
    """Kombu's order of a worker's queues: runs that have begun go before those that have not."""

    def consume(self, n: int) -> list[str]:
        """The queues in the order in which the next message is looked for."""
        return sorted(self.items[:n], key=lambda queue: not queue.endswith(WAKE_SUFFIX))


def wake_queue(queue: str) -> str:
    """Wake-ups have a queue of their own, so that they do not stand behind the backlog."""
    return queue + WAKE_SUFFIX


def send_first(app: Celery, run: Wake) -> bool:
    """Publish a run's first message. False, and one warning, when the broker cannot be reached.

    Under `task_always_eager` the run is carried here, as by `send_wakes`.
    """
    if (execute := _eager(app)) is not None:
        return bool(execute([run]))
    return _publish(app, [run], lambda each: _first_message(each, _queue_of(app, each))) == 1


def send_wakes(app: Celery, wakes: Iterable[Wake]) -> int:
    """Publish wake-ups over one connection; says how many the broker took, with one warning for the rest.

    Under `task_always_eager` nobody consumes: they are carried here, where that can be done.
    """
    if (execute := _eager(app)) is not None:
        return int(execute(wakes))
    return _publish(app, list(wakes), lambda wake: _wake_message(wake, _queue_of(app, wake)))


def _eager(app: Celery) -> Callable[[Iterable[Wake]], int] | None:
    """What carries runs in this process instead of sending messages; None where messages are sent."""
    return getattr(app.tasks.get(RUN_AGENT), "execute_wakes", None) if app.conf.task_always_eager else None


def close_producers(app: Celery) -> None:
    """Close this process's publishing connections to the app's broker."""
    parts = find_parts(app)
    pool = parts.producers.pop(os.getpid(), None) if parts is not None else None
    if pool is not None:
        pool.force_close_all()
        pool.connections.force_close_all()


Message = Mapping[str, Any]  # keyword arguments of `Celery.send_task`


def _first_message(run: Wake, queue: str) -> Message:
    ids = {"run_id": run.run_id, "agent_id": run.agent_id, "session_id": run.session_id}
    return _message(run, RUN_AGENT, queue, [ids])


def _queue_of(app: Celery, run: Wake) -> str:
    return queue_to_send_to(run.queue, parts_of(app).settings, run.run_id)


def _wake_message(wake: Wake, queue_of_run: str) -> Message:
    queue = wake_queue(queue_of_run)
    if wake.attempt == 0:
        return _first_message(wake, queue)
    return _message(wake, RESUME_RUN, queue, [wake.run_id, wake.checkpoint_id])


def _message(run: Wake, name: str, queue: str, args: Sequence[Any]) -> Message:
    """The run's message: ids for the worker, readable ids for Flower, the submission's own options."""
    own = options_of(run.canvas)
    return {
        **own,
        "name": name,
        "args": args,
        "task_id": run.run_id,
        "root_id": own.get("root_id") or run.run_id,
        "queue": queue,
        "headers": {
            **own.get("headers", {}),
            "wake_us": str(run.sent_us),
            "run_format": WRITTEN,
            **({RUN_ENDED: 1} if run.is_ended else {}),
        },
        "argsrepr": _readable_ids(run),
        "kwargsrepr": "{}",
        "serializer": "json",
        # Said, as Celery would take what the app's settings say of all tasks.
        "priority": own.get("priority"),
        "expires": None,
        "time_limit": None,
        "soft_time_limit": None,
    }


def _readable_ids(run: Wake) -> str:
    """Cut, where a record holds more than an id: a message of megabytes would never be taken."""
    return f"agent={run.agent_id[:SHOWN_CHARS]} session={run.session_id[:SHOWN_CHARS]} run={run.run_id}"


def _publish(app: Celery, runs: Sequence[Wake], message_of: Callable[[Wake], Message]) -> int:
    """Publish until the first failure: a broker that refuses one will refuse the next thousand too."""
    sent = 0
    try:
        if runs:
            with _producers(app).acquire(block=True, timeout=ANSWER_TIMEOUT_S) as producer:
                for run in runs:
                    _send_one(app, producer, run, message_of)
                    sent += 1
    except Exception as error:  # noqa: BLE001  # whatever a broker's client raises: the run is accepted
        log.warning(
            "broker.unreachable",
            run_id=runs[sent].run_id,
            unsent=len(runs) - sent,
            error=f"{type(error).__name__}: {error}",
            hint=f"accepted all the same; a worker's rescue loop sends it{_when(error)}",
        )
    return sent


def _when(error: Exception) -> str:
    """What has to be done about it; kombu's errors have redis-py's as their cause."""
    if any(one is not None and is_no_permission(one) for one in (error, error.__cause__)):
        return f". {RedisNoPermission.code}: config/acl/producer.acl has the rights that a producer needs"
    return " once the broker is back"


OF_ONE_MESSAGE = (TypeError, ValueError, LookupError, AttributeError, RecursionError, SerializationError)
"""What Celery and kombu raise for a message that cannot be made, and not for a broker."""


def _send_one(app: Celery, producer: Any, run: Wake, message_of: Callable[[Wake], Message]) -> None:
    """Send the run's message. One whose stored options cannot be read goes without them: its run is due."""
    try:
        _send(app, producer, message_of(run))
    except OF_ONE_MESSAGE as error:
        if not run.canvas:
            raise
        log.error(
            "run.options_left_out",
            run_id=run.run_id,
            error=f"{type(error).__name__}: {error}"[:SHOWN_CHARS],
            hint="what was linked to the run is not called; the field canvas of its record has its options",
        )
        _send(app, producer, message_of(replace(run, canvas="")))


def _send(app: Celery, producer: Any, message: Message) -> None:
    # ignore_result is said in the header only: as an option, a result backend would be subscribed to here.
    ignored = app.conf.result_backend is None or bool(app.conf.task_ignore_result)
    app.send_task(
        **{**message, "headers": {**message["headers"], "ignore_result": ignored}},
        router=_OwnQueue(app),
        producer=producer,
        ignore_result=True,
        add_to_parent=False,
        retry=True,
        retry_policy=RETRY_ONCE,
    )


class _OwnQueue:
    """Routes a message to the queue it names: the run's, whatever the app's `task_routes` say."""

    def __init__(self, app: Celery) -> None:
        self._queues = app.amqp.queues

    def route(self, options: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        try:
            queue = self._queues[options["queue"]]
        except KeyError:  # the app forbids queues that it does not know; this one is known to us
            queue = self._queues.new_missing(options["queue"])
        return {**options, "queue": queue}


def _producers(app: Celery) -> Any:
    """The app's publishing connections. A forked child makes its own: two processes share no socket."""
    # Without a lock, which a thread of the parent might hold in the child for ever: the first one is kept.
    by_process = parts_of(app).producers
    found = by_process.get(os.getpid())
    if found is None:
        connections = _publishing_connection(app).Pool(MAX_PRODUCERS)
        made = pools.ProducerPool(connections, limit=MAX_PRODUCERS)  # type: ignore[no-untyped-call]  # kombu
        found = by_process.setdefault(os.getpid(), made)
    return found


def _publishing_connection(app: Celery) -> Any:
    """A connection that hears of a silent broker; a consumer's, which blocks for long, must not."""
    options = {**app.conf.broker_transport_options, "max_retries": 0}
    driver = _driver(app)
    if driver == "redis":
        options |= {"socket_timeout": ANSWER_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    elif driver == "amqp":
        options |= {"read_timeout": ANSWER_TIMEOUT_S, "write_timeout": ANSWER_TIMEOUT_S}
    connection = app.connection_for_write(connect_timeout=CONNECT_TIMEOUT_S, transport_options=options)
    # By then kombu has read its own name of the transport: it is that by which it knows that TLS is wanted.
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
            hint="OPENAGENTS_BROKER_URL is a URL of a broker that Celery knows, whose library is installed",
        ) from error


def _transport_options(driver: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` are those of the broker's URL; its time limits shorten ours, never lengthen them."""
    if driver != "redis":
        return dict(given)
    if "client_name" in given and "client_name" not in redis.Channel.from_transport_options:
        raise BrokerConfigError(
            f"the option client_name of the broker's URL needs a newer kombu than {kombu.__version__}",
            hint="pip install --upgrade kombu, or leave the option out of the URL",
        )
    options = {
        "queue_order_strategy": f"{__name__}:WakesFirst",
        "visibility_timeout": 24 * 3600,  # with early acknowledgement only prefetched messages depend on it
        "socket_keepalive": True,
        "health_check_interval": 10,
        **given,
    }
    if "socket_timeout" in given:
        options["socket_timeout"] = min(given["socket_timeout"], BROKER_ANSWER_TIMEOUT_S)
    return options
