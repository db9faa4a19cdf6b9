"""The broker's transport: Redis as kombu speaks it, made safer and cheaper.

kombu lets an item that it cannot read end the whole worker: anybody who can write to the list could stop
all of them, and again at every start, as what was taken comes back. Ours puts such an item aside, and a key
that is not a list as well (`broken_items`). kombu waits for ever for an answer, on the loop that also
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

import time
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from queue import Empty
from typing import Any

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES, _transport_cache, redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from openagents_worker.loops import at_fork
from openagents_worker.producer.broken_items import (
    BrokenItems,
    problem_with_message,
    put_keys_aside,
    reason,
)
from openagents_worker.producer.message_size import BoundedMessage
from openagents_worker.store.permission import is_aborted_transaction, is_no_permission
from openagents_worker.store.redis_errors import is_temporary_refusal, is_wrong_type
from openagents_worker.telemetry.logs import get_logger

__all__ = ["RESUME_RUN", "RUN_AGENT", "RUN_ENDED", "TRANSPORTS", "Taken", "Transport", "use_in_workers_of"]

RUN_AGENT = "tasks.run_agent"
RESUME_RUN = "tasks.resume_run"
WAKE_UPS = (RUN_AGENT, RESUME_RUN)
RUN_ENDED = "run_ended"
"""The header of a message that only notifies Celery of a run's end."""

log = get_logger(__name__)

ANSWER_TIMEOUT_S = 5.0  # kombu's default is to wait for ever; it waits on the loop that also takes messages
LOOK_S = 1.0  # how often a connection that waits for a message is looked at
AT_ONCE_S = 0.02  # a message that had not to be waited for longer was there already, and perhaps others are
MOST_TAKEN = 8  # more begin together, and hold each other up on their way to their models
MOST_TAKEN_AGAIN = 64  # where nothing of what was taken had to be begun: more of its kind may stand behind it
MOST_READ, MOST_TURNS = 512, 64  # of that, before the worker looks at anything else: 60 ms
TAKE = resources.files(__package__).joinpath("take.lua").read_text("utf-8")


Taken = tuple[dict[str, Any], str]
"""A message as kombu stores it, and the queue in which it was."""


class QoS(redis.QoS):
    """Keeps what was taken and is not acknowledged: wake-ups in memory, all other messages in Redis."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # as all of kombu
        self._wake_ups: dict[str, Any] = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        if not _is_wake_up(message.headers):
            self._with_sound_keys(lambda: super(QoS, self).append(message, delivery_tag))  # type: ignore[no-untyped-call]
            return
        self._wake_ups[delivery_tag] = message
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        if self._wake_ups.pop(delivery_tag, None) is None:
            self._with_sound_keys(lambda: super(QoS, self).ack(delivery_tag))  # type: ignore[no-untyped-call]
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
            try:
                super().restore_by_tag(tag, client=client, leftmost=leftmost)  # type: ignore[no-untyped-call]
            except Exception as error:
                if _is_of_broker(self.channel.connection, error):
                    raise
                self.put_aside(tag, reason(error))
            return
        where = message.delivery_info
        with self.channel.conn_or_acquire(client) as client:
            self.channel._do_restore_message(
                message._raw, where["exchange"], where["routing_key"], client, leftmost
            )

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Give back what others have taken and not acknowledged; one item that cannot be read stops none."""
        self._with_sound_keys(lambda: super(QoS, self).restore_visible(*args, **options))  # type: ignore[no-untyped-call]

    def put_aside(self, tag: str, why: str) -> None:
        """What was noted under this tag cannot be read: it is kept elsewhere, and comes back no more."""
        with self.channel.conn_or_acquire() as client:
            item = client.hget(self.unacked_key, tag)
        if item is not None:
            self.channel.connection.broken.add(self.unacked_key, item, why)
        self.forget(tag)

    def forget(self, tag: str) -> None:
        """Whatever was noted under this tag is noted no more."""
        self._wake_ups.pop(tag, None)
        self._delivered.pop(tag, None)
        self._with_sound_keys(lambda: self._remove_from_indices(tag).execute())  # type: ignore[no-untyped-call]

    def _with_sound_keys(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if not is_wrong_type(error):
                raise
            types = ((self.unacked_key, "hash"), (self.unacked_index_key, "zset"))
            self.channel.put_keys_aside((*types, (self.unacked_mutex_key, "string")))
            work()


class Channel(redis.Channel):
    QoS = QoS
    Message = BoundedMessage
    room: Callable[[], int] | None = None
    """How many messages more can be begun now. None: nobody says it, and each is asked for by itself."""
    sift: Callable[[list[Taken]], list[Taken]] | None = None
    """Says which of the messages that were taken together are to be delivered now. None: all."""
    when_sifted: Callable[[], None] = staticmethod(lambda: None)
    """Called when nothing more is taken for now."""
    limit_of: Callable[[object], int | None] = staticmethod(lambda queue: None)
    """How many bytes a message of this queue may have; None: as many as its sender likes."""
    _take: Any = None
    _item: Any = None
    _kept_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all that a channel asks; its connections are those of the channel's pool."""
        if asynchronous:
            client = super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
            client.parse_response = self._noting_item(client.parse_response)
            return client
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
        """An answer of Redis: of BRPOP, list and item. A large item gives None, as if nothing had come."""
        if type(answer) is list and len(answer) == 2 and isinstance(answer[1], bytes):
            queue = bytes_to_str(answer[0]).rsplit(self.sep, 1)[0]  # type: ignore[no-untyped-call]
            return None if self._is_too_large(queue, answer[1]) else answer
        return answer

    def _is_too_large(self, queue: str, item: bytes) -> bool:
        """Whether an item is too large to be parsed; it is put aside then."""
        limit = self.limit_of(queue)
        if limit is None or len(item) <= limit:
            return False
        self.connection.broken.add(queue, item, f"it has {len(item):,} bytes, {limit:,} are allowed")
        return True

    def basic_consume(self, queue: str, *args: Any, **options: Any) -> Any:
        """Remote control may ask for any queue (`add_consumer`); a key of this library is none."""
        if self.connection.broken.is_ours(queue):
            raise ValueError(f"{queue!r} is not a valid queue name: it would be a key of this library")
        return super().basic_consume(queue, *args, **options)  # type: ignore[no-untyped-call]

    def _brpop_read(self, **options: Any) -> Any:
        if self.sift is None:
            return self._read_messages(**options)
        self.connection.taken = []
        try:
            found = self._read_messages(**options)
            self._read_on()
            return found
        finally:
            if self.connection.taken:
                self._deliver_taken()
            self.connection.taken = None
            self.when_sifted()

    def _read_on(self) -> None:
        """Where nothing of what was taken had to be begun, more of its kind may stand before a run."""
        read = 0
        for _ in range(MOST_TURNS):
            if self.room is None or not self.connection.taken:
                break
            read += len(self.connection.taken)
            if self._deliver_taken() or read >= MOST_READ:
                return
            self._take_more(min(self.room(), MOST_TAKEN_AGAIN))
        self._deliver_taken()  # also nothing: so it is known that nothing stands behind

    def _deliver_taken(self) -> bool:
        """Deliver what of the messages is to be delivered now; says whether that was anything."""
        taken, self.connection.taken = self.connection.taken, None
        sift: Any = self.sift
        try:
            now = sift(taken)
            for message, queue in now:  # one that cannot be used is put aside there
                self.connection._deliver(message, queue)
        finally:
            self.connection.taken = []
        return len(now) > 0

    def _read_messages(self, **options: Any) -> Any:
        at_once = time.monotonic() - (self._brpop_sent_at or 0.0) < AT_ONCE_S
        self._item = None
        try:
            found = super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # as all of kombu
        except Empty:
            raise
        except Exception as error:
            if is_wrong_type(error):
                self._put_queues_aside(list(self.active_queues))
            elif self._item is None or _is_of_broker(self.connection, error):
                raise
            else:
                queue, item = self._item
                self.connection.broken.add(bytes_to_str(queue), item, reason(error))  # type: ignore[no-untyped-call]
            raise Empty from None
        finally:
            self._item = None
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
                    [self.unacked_key, self.unacked_index_key, *keys],
                    [most, time.time(), MOST_TAKEN_AGAIN],
                    client,
                )
            except self.ResponseError as error:
                if is_wrong_type(error):
                    return  # whoever waits for the next message puts that key aside
                log.warning("broker.one_by_one", error=str(error), hint="scripts are not allowed there")
                self.room = None
                return
        for key, item, tag in zip(taken[::3], taken[1::3], taken[2::3], strict=True):
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]  # type: ignore[no-untyped-call]
            self._queue_cycle.rotate(queue)
            if self._is_put_aside(queue, item) and tag:
                self.qos.forget(bytes_to_str(tag))  # type: ignore[no-untyped-call]

    def _is_put_aside(self, queue: str, item: bytes) -> bool:
        """Whether an item of a queue could not be delivered, and was put aside."""
        if self._is_too_large(queue, item):
            return True
        try:
            self.connection._deliver(loads(bytes_to_str(item)), queue)  # type: ignore[no-untyped-call]
        except Exception as error:
            if _is_of_broker(self.connection, error):
                raise
            self.connection.broken.add(queue, item, reason(error))
            return True
        return False

    def _noting_item(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        """What reads an answer, and notes the item that it gives: it may be none that kombu can read."""

        def parse_response(connection: Any, command_name: str, **options: Any) -> Any:
            answer = parse(connection, command_name, **options)
            if command_name == "BRPOP" and answer:
                self._item = answer
            return answer

        return parse_response

    def _receive(self) -> Any:
        try:
            return super()._receive()  # type: ignore[no-untyped-call]
        except Exception as error:
            if _is_of_broker(self.connection, error):
                raise
            log.error("broadcast.unreadable", error=reason(error))  # to all: nobody's run is concerned
            return False

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        broken: BrokenItems = self.connection.broken
        if why := broken.why_not_back(payload, exchange, routing_key):
            broken.add(self.unacked_key, _as_text(payload), why)
            return
        super()._do_restore_message(payload, exchange, routing_key, pipe, leftmost)  # type: ignore[no-untyped-call]

    def _size(self, queue: str) -> int:
        return int(self._with_sound_queues([queue], super()._size, queue))

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        self._with_sound_queues([queue], super()._put, queue, message, **options)

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        try:
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_wrong_type(error):
                raise
            self.put_keys_aside(((self.keyprefix_queue % exchange, "set"),))
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]

    def _with_sound_queues(
        self, queues: list[str], work: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        try:
            return work(*args, **options)
        except Exception as error:
            if not is_wrong_type(error):
                raise
            self._put_queues_aside(queues)
            return work(*args, **options)

    def _put_queues_aside(self, queues: Iterable[str]) -> None:
        queues = [queue for queue in queues if not self.connection.broken.is_ours(queue)]
        keys = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]  # type: ignore[no-untyped-call]
        self.put_keys_aside((key, "list") for key in keys)

    def put_keys_aside(self, types: Iterable[tuple[str, str]]) -> None:
        with self.conn_or_acquire() as client:
            put_keys_aside(client, types, self.connection.broken)


def _is_of_broker(line: Any, error: BaseException) -> bool:
    """Whether this is about the broker, not about an item. kombu counts a KeyError as a lost connection."""
    errors = (*line.connection_errors, *line.channel_errors)
    return isinstance(error, errors) and not isinstance(error, LookupError)


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
                if is_refused or not is_temporary_refusal(error):
                    raise
                self.disconnect()
                raise ConnectionError(f"Redis takes no command now: {error}") from error

    return GivingUp


class Transport(redis.Transport):
    """Redis as kombu speaks it, but for items that are no messages."""

    Channel = Channel
    taken: list[Taken] | None = None
    """Where messages are collected that were taken together; None: each is delivered at once."""
    broken = BrokenItems()
    """What is done with items that are not messages; a worker keeps them."""

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """kombu looks for an answer that is overdue, but as seldom as it is allowed to be late."""
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]
        cycle: Any = self.cycle
        watch = getattr(cycle, "_brpop_health_tref", None)  # kombu 5.7 and newer
        if watch is not None:
            watch.cancel()
            cycle._brpop_health_tref = loop.call_repeatedly(LOOK_S, cycle.maybe_check_brpop_health)

    def _deliver(self, message: Any, queue: str) -> None:
        if problem := problem_with_message(message):
            self._put_aside(message, queue, problem)
            return
        if self.taken is not None:
            self.taken.append((message, queue))
            return
        try:
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
        except Exception as error:
            # kombu's own, while it makes a message of it; Celery's callbacks, which run inside, answer theirs
            # (celery/invalid_messages.py).
            if _is_of_broker(self, error):
                raise
            self._put_aside(message, queue, reason(error))

    def _put_aside(self, message: Any, queue: str, why: str) -> None:
        self.broken.add(queue, _as_text(message), why)
        properties = message.get("properties") if isinstance(message, dict) else None
        tag = properties.get("delivery_tag") if isinstance(properties, dict) else None
        is_noted = isinstance(tag, str) and tag.isprintable()  # else it is none that Redis could hold
        for channel in self.channels if is_noted else ():
            channel.qos.forget(tag)


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


def _as_text(message: Any) -> str:
    """What was read, as JSON again; in its own words where that cannot be."""
    try:
        return str(dumps(message))  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - it is shown to people, whatever it is
        return repr(message)
