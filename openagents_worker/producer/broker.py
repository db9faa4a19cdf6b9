"""The broker's transport: Redis as kombu speaks it, made safer and cheaper.

kombu lets an item that it cannot read end the whole worker: anybody who can write to the list could stop
all of them. Ours drops such an item and says so. kombu waits for ever for an answer, on the loop that also
takes messages: a connection on which nothing comes any more makes a worker deaf. Ours waits for seconds,
and then connects again. A Redis that takes no command for a while ends a worker of kombu's, too: one that
has too few replicas or is master no more. Ours connects again. kombu makes a Redis client for every message
it sends and acknowledges, each with a table of all commands: a fifth of what a busy worker computed. Ours
keeps one. kombu takes one message a turn of its hub; ours takes as many as can be begun, which saves a
third of a busy worker's time. And kombu writes every message that it takes into a hash, and out of it again
when it is acknowledged, for messages that must not be lost. Ours does so for all but a run's wake-ups: a
run whose message is lost is in Redis, and is woken again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from importlib import resources
from queue import Empty
from typing import Any

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES, _transport_cache, redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from openagents_worker.loops import at_fork
from openagents_worker.producer.message_size import BoundedMessage
from openagents_worker.store.failures import refuses_now
from openagents_worker.store.permission import is_aborted_transaction, is_no_permission
from openagents_worker.telemetry import get_logger

__all__ = ["RESUME_RUN", "RUN_AGENT", "RUN_ENDED", "TRANSPORTS", "Taken", "Transport", "use_in_workers_of"]

RUN_AGENT = "tasks.run_agent"
RESUME_RUN = "tasks.resume_run"
WAKE_UPS = (RUN_AGENT, RESUME_RUN)
RUN_ENDED = "run_ended"
"""The header of a message that only notifies Celery of a run's end."""

log = get_logger(__name__)

SHOWN_CHARS = 200
ANSWER_TIMEOUT_S = 5.0  # kombu's default is to wait for ever; it waits on the loop that also takes messages
LOOK_S = 1.0  # how often a connection that waits for a message is looked at
AT_ONCE_S = 0.02  # a message that had not to be waited for longer was there already, and perhaps others are
MOST_TAKEN = 8  # more begin together, and hold each other up on their way to their models
MOST_TAKEN_AGAIN = 64  # where nothing of what was taken had to be begun: more of its kind may stand behind it
MOST_TURNS = 8  # of that, before the worker looks at anything else
TAKE = resources.files(__package__).joinpath("take.lua").read_text("utf-8")
UNREADABLE_JSON = (json.JSONDecodeError, UnicodeDecodeError)
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError)
"""What kombu raises for a part that is not of the type which it takes for granted; Celery's callbacks, which
run inside, answer their own (worker/refusal.py)."""


Taken = tuple[dict[str, Any], str]
"""A message as kombu stores it, and the queue in which it was."""


class QoS(redis.QoS):
    """Keeps what was taken and is not acknowledged: wake-ups in memory, all other messages in Redis."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # as all of kombu
        self._wake_ups: dict[str, Any] = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        if not _is_wake_up(message.headers):
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]
            return
        self._wake_ups[delivery_tag] = message
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        if self._wake_ups.pop(delivery_tag, None) is None:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]
        else:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if requeue or delivery_tag not in self._wake_ups:
            super().reject(delivery_tag, requeue=requeue)  # type: ignore[no-untyped-call]
        else:
            self.ack(delivery_tag)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        message = self._wake_ups.pop(tag, None)
        if message is None:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)  # type: ignore[no-untyped-call]
            return
        where = message.delivery_info
        with self.channel.conn_or_acquire(client) as client:
            self.channel._do_restore_message(
                message._raw, where["exchange"], where["routing_key"], client, leftmost
            )


class Channel(redis.Channel):
    QoS = QoS
    Message = BoundedMessage
    room: Callable[[], int] | None = None
    """How many messages more can be begun now. None: nobody says it, and each is asked for by itself."""
    sift: Callable[[list[Taken]], list[Taken]] | None = None
    """Says which of the messages that were taken together are to be delivered now. None: all."""
    limit_of: Callable[[object], int | None] = staticmethod(lambda queue: None)
    """How many bytes a message of this queue may have; None: as many as its sender likes."""
    _take: Any = None
    _kept_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all that a channel asks; its connections are those of the channel's pool."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = super()._create_client()  # type: ignore[no-untyped-call]
        return self._kept_client

    def _connparams(self, asynchronous: bool = False) -> Any:
        params = super()._connparams(asynchronous)  # type: ignore[no-untyped-call]
        params["connection_class"] = _giving_up(params["connection_class"], self._without_too_large)
        if params.get("socket_timeout") is None:
            params["socket_timeout"] = ANSWER_TIMEOUT_S
        return params

    def _without_too_large(self, answer: Any) -> Any:
        """An answer to BRPOP, before anything is made of it: list and item, or whatever else."""
        if type(answer) is list and len(answer) == 2 and isinstance(answer[1], bytes):
            return [answer[0], self._item_or_nothing(answer[0], answer[1])]
        return answer

    def _item_or_nothing(self, key: Any, item: bytes) -> bytes:
        queue = bytes_to_str(key).rsplit(self.sep, 1)[0]  # type: ignore[no-untyped-call]
        limit = self.limit_of(queue)
        if limit is None or len(item) <= limit:
            return item
        log.error(
            "message.too_large", queue=queue, bytes=len(item), allowed=limit, begins=str(item[:SHOWN_CHARS])
        )
        return b"null"

    def _brpop_read(self, **options: Any) -> Any:
        if self.sift is None:
            return self._read_messages(**options)
        self.connection.taken = []
        try:
            found = self._read_messages(**options)
            for _ in range(MOST_TURNS):
                if self.room is None or not self.connection.taken or self._deliver_taken() > 0:
                    break
                self._take_more(min(self.room(), MOST_TAKEN_AGAIN))
            return found
        finally:
            self._deliver_taken()
            self.connection.taken = None

    def _deliver_taken(self) -> int:
        """Deliver what of the messages is to be delivered now; says how many."""
        taken, self.connection.taken = self.connection.taken, None
        sift: Any = self.sift
        try:
            now = sift(taken) if taken else []
            for message, queue in now:
                self.connection._deliver(message, queue)
        finally:
            self.connection.taken = []
        return len(now)

    def _read_messages(self, **options: Any) -> Any:
        at_once = time.monotonic() - (self._brpop_sent_at or 0.0) < AT_ONCE_S
        try:
            found = super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # as all of kombu
        except UNREADABLE_JSON as error:
            _say_unreadable(error)
            raise Empty from None
        if found and at_once and self.room is not None:
            in_hand = len(self.connection.taken or ())  # not delivered yet, so not counted yet
            self._take_more(min(self.room() - in_hand, MOST_TAKEN))
        return found

    def _take_more(self, most: int) -> None:
        """Take what else waits, as far as it can be begun now."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if most <= 0 or not queues:
            return
        keys = [
            self._q_for_pri(queue, step)  # type: ignore[no-untyped-call]
            for step in self.priority_steps
            for queue in queues
        ]
        with self.conn_or_acquire() as client:
            self._take = self._take or client.register_script(TAKE)
            try:
                taken = self._take(
                    [self.unacked_key, self.unacked_index_key, *keys], [most, time.time()], client
                )
            except self.ResponseError as error:
                log.warning("broker.one_by_one", error=str(error), hint="scripts are not allowed there")
                self.room = None
                return
        for key, item in zip(taken[::2], taken[1::2], strict=True):
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]  # type: ignore[no-untyped-call]
            self._queue_cycle.rotate(queue)
            try:
                text = bytes_to_str(self._item_or_nothing(key, item))  # type: ignore[no-untyped-call]
                self.connection._deliver(loads(text), queue)  # type: ignore[no-untyped-call]
            except UNREADABLE_JSON as error:
                _say_unreadable(error)


def _say_unreadable(error: Exception) -> None:
    log.error("message.unreadable", error=str(error)[:SHOWN_CHARS])


def _giving_up(connection_class: Any, looked_at: Callable[[Any], Any]) -> Any:
    """The same connection class, for which a Redis that takes no command now is one that is not there.

    `looked_at` is given each answer, and gives what is made of it.
    Celery connects again then, to the master of that time. Any other answer to its waiting ends the worker.
    """

    class GivingUp(connection_class):  # type: ignore[misc]  # a base known only at run time
        lacks_a_right = False

        def connect(self, *args: Any, **options: Any) -> None:
            super().connect(*args, **options)
            at_fork(self)

        def start_afresh(self) -> None:
            """Close the socket that a forked child has inherited; kombu would ask its parent's poller."""
            self._parser.on_disconnect()
            sock = vars(self).get("_sock")
            self._sock = None
            if sock is not None:
                sock.close()

        def read_response(self, *args: Any, **options: Any) -> Any:
            try:
                return looked_at(super().read_response(*args, **options))
            except Exception as error:
                if is_no_permission(error):
                    self.lacks_a_right = True
                    raise
                # A transaction with a refused command is aborted, whatever the state of Redis: redis-py says
                # then what was refused.
                is_refused = self.lacks_a_right and is_aborted_transaction(error)
                self.lacks_a_right = False
                if is_refused or not refuses_now(error):
                    raise
                self.disconnect()
                raise ConnectionError(f"Redis takes no command now: {error}") from error

    return GivingUp


class Transport(redis.Transport):
    """Redis as kombu speaks it, but for items that are no messages."""

    Channel = Channel
    taken: list[Taken] | None = None
    """Where messages are collected that were taken together; None: each is delivered at once."""

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """kombu looks for an answer that is overdue, but as seldom as it is allowed to be late."""
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]
        cycle: Any = self.cycle
        watch = getattr(cycle, "_brpop_health_tref", None)  # kombu 5.7 and newer
        if watch is not None:
            watch.cancel()
            cycle._brpop_health_tref = loop.call_repeatedly(LOOK_S, cycle.maybe_check_brpop_health)

    def _deliver(self, message: Any, queue: str) -> None:
        if problem := _problem(message):
            log.error("message.unreadable", queue=queue, error=problem)
            return
        if self.taken is not None:
            self.taken.append((message, queue))
            return
        try:
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
        except UNREADABLE as error:  # kombu's own, while it makes a message of it: nothing holds it yet
            log.error(
                "message.unreadable", queue=queue, error=f"{type(error).__name__}: {error}"[:SHOWN_CHARS]
            )


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same, over connections to whichever Redis is the master."""


class SentinelTransport(Transport, redis.SentinelTransport):
    Channel = SentinelChannel


TRANSPORT = f"{__name__}:{Transport.__name__}"
SENTINEL_TRANSPORT = f"{__name__}:{SentinelTransport.__name__}"
"""As kombu names a transport."""

TRANSPORTS = {"redis": TRANSPORT, "rediss": TRANSPORT, "sentinel": SENTINEL_TRANSPORT}
"""Ours by the alias of kombu's that it stands for, which is the scheme of a broker's URL. A socket's,
`redis+socket`, has the alias `redis`."""


def use_in_workers_of(app: Celery) -> None:
    """Let workers of this app read a Redis broker through our transport; other processes are left alone."""

    def in_its_worker(sender: Any = None, **_: Any) -> None:
        # By its alias, not by the setting broker_transport: Flower takes that for the scheme of the URL.
        if sender is not None and sender.app is app:
            for alias, transport in TRANSPORTS.items():
                TRANSPORT_ALIASES[alias] = transport
                _transport_cache.pop(alias, None)  # somebody may have asked for it already

    signals.worker_init.connect(in_its_worker, weak=False)


def _is_wake_up(headers: Mapping[str, Any]) -> bool:
    """Whether a run in Redis stands behind the message: not so when its producer is not ours."""
    return headers.get("task") in WAKE_UPS and "wake_us" in headers


def _problem(message: Any) -> str | None:
    """What keeps this from being a message of kombu's; None when nothing does."""
    if not isinstance(message, dict):
        return f"a {type(message).__name__} is no message"
    properties = message.get("properties")
    if not isinstance(properties, dict) or "delivery_tag" not in properties:
        return "it has no properties.delivery_tag"
    if not isinstance(properties.get("delivery_info"), dict):
        return "it has no properties.delivery_info"
    return None if isinstance(message.get("body"), str | bytes) else "it has no body"
