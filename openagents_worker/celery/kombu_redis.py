"""kombu's Redis transport for workers. The only place that patches how workers read messages, in four ways.

1. Items that cannot be decoded, and keys with a wrong type, are put aside (`broken_items`). In kombu they end
the worker, again at every start. 2. A worker takes as many messages at a time as it has free slots. kombu
takes one per turn of its event loop; this change saves a third of the CPU time of a busy worker. 3. Wake-ups
of runs are not stored in kombu's hash of unacknowledged messages. If such a message is lost, the run is still
in Redis and is woken again. 4. The size of messages is limited. `producer.redis_transport` has further
changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import resources
from queue import Empty
from typing import Any

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES, _transport_cache, redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads

from openagents_worker.celery.message_size import BoundedMessage
from openagents_worker.producer.broken_items import BrokenItems, problem_with_message, reason
from openagents_worker.producer.message_names import RESUME_RUN, RUN_AGENT
from openagents_worker.producer.redis_transport import PublishingChannel, PublishingTransport
from openagents_worker.store.redis_errors import is_wrong_type
from openagents_worker.telemetry.logs import get_logger

__all__ = ["TRANSPORTS", "Channel", "Taken", "Transport", "use_in_workers_of"]

WAKE_UPS = (RUN_AGENT, RESUME_RUN)

log = get_logger(__name__)

HEALTH_CHECK_S = 1.0  # the period of checks of a connection that waits for a message
AT_ONCE_S = 0.02  # a message that arrives within this time was already there, and others may be there, too
MAX_TAKEN = 8  # if more runs started together, they would delay each other before their first model call
MAX_TAKEN_AGAIN = 64  # if none of the taken messages started a run, more of this kind may follow in the queue
MAX_MESSAGES_READ, MAX_READS = 512, 64  # in one turn of the event loop: 60 ms
TAKE = resources.files(__package__).joinpath("take.lua").read_text("utf-8")


Taken = tuple[dict[str, Any], str]
"""A message as kombu stores it, and the queue in which it was."""


class QoS(redis.QoS):
    """Stores unacknowledged messages: wake-ups in memory, all other messages in Redis."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]  # as all of kombu
        self._wake_ups: dict[str, Any] = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        if not _is_wake_up(message.headers):
            self._repairing_keys(lambda: super(QoS, self).append(message, delivery_tag))  # type: ignore[no-untyped-call]
            return
        self._wake_ups[delivery_tag] = message
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def ack(self, delivery_tag: str) -> None:
        if self._wake_ups.pop(delivery_tag, None) is None:
            self._repairing_keys(lambda: super(QoS, self).ack(delivery_tag))  # type: ignore[no-untyped-call]
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
                if _is_broker_error(self.channel.connection, error):
                    raise
                self.put_aside(tag, reason(error))
            return
        delivery = message.delivery_info
        with self.channel.conn_or_acquire(client) as client:
            self.channel._do_restore_message(
                message._raw, delivery["exchange"], delivery["routing_key"], client, leftmost
            )

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """Return the unacknowledged messages of dead workers to their queues; a broken item does not stop
        it."""
        self._repairing_keys(lambda: super(QoS, self).restore_visible(*args, **options))  # type: ignore[no-untyped-call]

    def put_aside(self, tag: str, problem: str) -> None:
        """Store an unreadable unacknowledged message as a broken item, and forget it."""
        with self.channel.conn_or_acquire() as client:
            item = client.hget(self.unacked_key, tag)
        if item is not None:
            self.channel.connection.broken.add(self.unacked_key, item, problem)
        self.forget(tag)

    def forget(self, tag: str) -> None:
        """Remove a message from the unacknowledged ones."""
        self._wake_ups.pop(tag, None)
        self._delivered.pop(tag, None)
        self._repairing_keys(lambda: self._remove_from_indices(tag).execute())  # type: ignore[no-untyped-call]

    def _repairing_keys(self, work: Callable[[], object]) -> None:
        """Do the work. If a key of kombu has a wrong type, put the key aside and do the work again."""
        try:
            work()
        except Exception as error:
            if not is_wrong_type(error):
                raise
            types = ((self.unacked_key, "hash"), (self.unacked_index_key, "zset"))
            self.channel.put_keys_aside((*types, (self.unacked_mutex_key, "string")))
            work()


class Channel(PublishingChannel):
    """A channel of a worker that takes several messages at a time and puts broken items aside."""

    QoS = QoS
    Message = BoundedMessage
    free_slots: Callable[[], int] | None = None
    """The number of free worker slots. None: unknown, so messages are taken one at a time."""
    select_messages: Callable[[list[Taken]], list[Taken]] | None = None
    """Selects from the taken messages the ones to deliver now. None: all are delivered."""
    after_selection: Callable[[], None] = staticmethod(lambda: None)
    """Called after each read, when its messages were selected and delivered."""
    max_message_bytes: Callable[[object], int | None] = staticmethod(lambda queue: None)
    """The size limit of a message of a queue, in bytes; None: no limit."""
    _take: Any = None
    _item: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        client = super()._create_client(asynchronous)
        if asynchronous:
            client.parse_response = self._remembering_item(client.parse_response)
        return client

    def _filtered_answer(self, answer: Any) -> Any:
        """The answer of Redis. If it is an item of BRPOP that is too large: None, as if there were no
        item."""
        if type(answer) is list and len(answer) == 2 and isinstance(answer[1], bytes):
            queue = bytes_to_str(answer[0]).rsplit(self.sep, 1)[0]  # type: ignore[no-untyped-call]
            return None if self._is_too_large(queue, answer[1]) else answer
        return answer

    def _is_too_large(self, queue: str, item: bytes) -> bool:
        """Whether an item is too large to be parsed. Such an item is put aside."""
        limit = self.max_message_bytes(queue)
        if limit is None or len(item) <= limit:
            return False
        self.connection.broken.add(queue, item, f"it has {len(item):,} bytes; at most {limit:,} are allowed")
        return True

    def basic_consume(self, queue: str, *args: Any, **options: Any) -> Any:
        """Consume a queue. Remote control (`add_consumer`) may name any key, so our keys are rejected."""
        if self.connection.broken.is_ours(queue):
            raise ValueError(f"{queue!r} is not a valid queue name: it would be a key of this library")
        return super().basic_consume(queue, *args, **options)  # type: ignore[no-untyped-call]

    def _brpop_read(self, **options: Any) -> Any:
        """Read the answer of BRPOP and deliver its message.

        With `select_messages`, more waiting messages are read as well, and only the selected ones are
        delivered.
        """
        if self.select_messages is None:
            return self._read_messages(**options)
        self.connection.taken = []
        try:
            found = self._read_messages(**options)
            self._read_more()
            return found
        finally:
            if self.connection.taken:
                self._deliver_taken()
            self.connection.taken = None
            self.after_selection()

    def _read_more(self) -> None:
        """Take more messages while the taken ones start no run: there may be many of them before a run."""
        read = 0
        for _ in range(MAX_READS):
            if self.free_slots is None or not self.connection.taken:
                break
            read += len(self.connection.taken)
            if self._deliver_taken() or read >= MAX_MESSAGES_READ:
                return
            self._take_more(min(self.free_slots(), MAX_TAKEN_AGAIN))
        self._deliver_taken()  # also without messages: it shows that the queue has no more of them

    def _deliver_taken(self) -> bool:
        """Deliver the selected messages. Returns whether there was at least one."""
        taken, self.connection.taken = self.connection.taken, None
        select: Any = self.select_messages
        try:
            selected = select(taken)
            for message, queue in selected:  # `_deliver` puts an invalid message aside
                self.connection._deliver(message, queue)
        finally:
            self.connection.taken = []
        return len(selected) > 0

    def _read_messages(self, **options: Any) -> Any:
        """Read one message and, if it was already there, as many others as there are free slots."""
        at_once = time.monotonic() - (self._brpop_sent_at or 0.0) < AT_ONCE_S
        self._item = None
        try:
            found = super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # as all of kombu
        except Empty:
            raise
        except Exception as error:
            if is_wrong_type(error):
                self._put_queues_aside(list(self.active_queues))
            elif self._item is None or _is_broker_error(self.connection, error):
                raise
            else:
                queue, item = self._item
                self.connection.broken.add(bytes_to_str(queue), item, reason(error))  # type: ignore[no-untyped-call]
            raise Empty from None
        finally:
            self._item = None
        if found and at_once and self.free_slots is not None:
            undelivered = len(self.connection.taken or ())  # they do not occupy slots yet
            self._take_more(min(self.free_slots() - undelivered, MAX_TAKEN))
        return found

    def _take_more(self, most: int) -> None:
        """Take up to `most` further messages with one script."""
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
                    [most, time.time(), MAX_TAKEN_AGAIN],
                    client,
                )
            except self.ResponseError as error:
                if is_wrong_type(error):
                    return  # the next blocking read puts that key aside
                log.warning("broker.one_by_one", error=str(error), hint="Redis does not allow scripts")
                self.free_slots = None
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
            if _is_broker_error(self.connection, error):
                raise
            self.connection.broken.add(queue, item, reason(error))
            return True
        return False

    def _remembering_item(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        """A parser of answers that remembers the last item of BRPOP, in case kombu cannot decode it."""

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
            if _is_broker_error(self.connection, error):
                raise
            # A broadcast of remote control does not affect a run.
            log.error("broadcast.unreadable", error=reason(error))
            return False

    def _do_restore_message(
        self, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        broken: BrokenItems = self.connection.broken
        if problem := broken.problem_with_return(payload, exchange, routing_key):
            broken.add(self.unacked_key, _as_text(payload), problem)
            return
        super()._do_restore_message(payload, exchange, routing_key, pipe, leftmost)  # type: ignore[no-untyped-call]


def _is_broker_error(transport: Any, error: BaseException) -> bool:
    """Whether an error concerns the broker, not one item. kombu counts KeyError as a lost connection."""
    errors = (*transport.connection_errors, *transport.channel_errors)
    return isinstance(error, errors) and not isinstance(error, LookupError)


class Transport(PublishingTransport):
    """kombu's Redis transport with the changes of this module."""

    Channel = Channel
    taken: list[Taken] | None = None
    """Messages that were taken and not delivered yet. None: each message is delivered at once."""

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Check for overdue answers every second. kombu checks only once per timeout."""
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]
        cycle: Any = self.cycle
        timer = getattr(cycle, "_brpop_health_tref", None)  # kombu 5.7 and newer
        if timer is not None:
            timer.cancel()
            cycle._brpop_health_tref = loop.call_repeatedly(HEALTH_CHECK_S, cycle.maybe_check_brpop_health)

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
            # The error is from kombu, which creates the message. Celery's callbacks handle their own errors
            # (celery/invalid_messages.py).
            if _is_broker_error(self, error):
                raise
            self._put_aside(message, queue, reason(error))

    def _put_aside(self, message: Any, queue: str, problem: str) -> None:
        self.broken.add(queue, _as_text(message), problem)
        properties = message.get("properties") if isinstance(message, dict) else None
        tag = properties.get("delivery_tag") if isinstance(properties, dict) else None
        is_valid_tag = isinstance(tag, str) and tag.isprintable()  # an invalid one is not stored in Redis
        for channel in self.channels if is_valid_tag else ():
            channel.qos.forget(tag)


class SentinelChannel(Channel, redis.SentinelChannel):
    """The same channel, with connections to the current master."""


class SentinelTransport(Transport, redis.SentinelTransport):
    """The same transport for a broker behind sentinels."""

    Channel = SentinelChannel


TRANSPORT = f"{__name__}:{Transport.__name__}"
SENTINEL_TRANSPORT = f"{__name__}:{SentinelTransport.__name__}"
"""The names of the transports for kombu."""

TRANSPORTS = {"redis": TRANSPORT, "rediss": TRANSPORT, "sentinel": SENTINEL_TRANSPORT}
"""The transports by the kombu alias that they replace, which is the scheme of the broker URL.

kombu maps the scheme `redis+socket` to the alias `redis`.
"""


def use_in_workers_of(app: Celery) -> None:
    """Use our transports in workers of this app. Other processes are not changed."""

    def replace_transports(sender: Any = None, **_: Any) -> None:
        # Not with the setting broker_transport, because Flower uses it as the scheme of the URL.
        if sender is not None and sender.app is app:
            for alias, transport in TRANSPORTS.items():
                TRANSPORT_ALIASES[alias] = transport
                _transport_cache.pop(alias, None)  # it may already be loaded

    signals.worker_init.connect(replace_transports, weak=False)


def _is_wake_up(headers: Mapping[str, Any]) -> bool:
    """Whether the message wakes a run in Redis. A message of another producer is not a wake-up."""
    return headers.get("task") in WAKE_UPS and "wake_us" in headers


def _as_text(message: Any) -> str:
    """The parsed message as JSON text again, or its `repr` if that fails."""
    try:
        return str(dumps(message))  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - any message must be shown
        return repr(message)
