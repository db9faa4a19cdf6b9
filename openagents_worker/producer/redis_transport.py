"""kombu's Redis transport for publishing, with three changes. The only place that patches how kombu connects.

1. The wait for an answer has a timeout of some seconds, and then the transport connects again. kombu waits
forever. 2. If Redis temporarily rejects commands (READONLY, NOREPLICAS), the transport connects again. In
kombu the worker ends. 3. A channel has one Redis client. kombu makes one for every sent and acknowledged
message, which takes a fifth of the CPU time of a busy worker. Keys of kombu with a wrong type are put aside
(`broken_items`). Workers read messages with a subclass, `celery.kombu_redis`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kombu.transport import redis

from openagents_worker.loops import at_fork
from openagents_worker.producer.broken_items import BrokenItems, put_keys_aside
from openagents_worker.store.permission import is_aborted_transaction, is_permission_error
from openagents_worker.store.redis_errors import is_temporary_error, is_wrong_type

__all__ = ["ANSWER_TIMEOUT_S", "TRANSPORTS", "PublishingChannel", "PublishingTransport"]

ANSWER_TIMEOUT_S = 5.0  # kombu waits forever by default, on the event loop that also receives messages


class PublishingChannel(redis.Channel):
    """A channel with one Redis client, which repairs the keys to which it writes."""

    _kept_client: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        """The Redis client of the channel. It uses the connection pool of the channel."""
        if asynchronous:
            return super()._create_client(asynchronous)  # type: ignore[no-untyped-call]
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = super()._create_client()  # type: ignore[no-untyped-call]
        return self._kept_client

    def _connparams(self, asynchronous: bool = False) -> Any:
        params = super()._connparams(asynchronous)  # type: ignore[no-untyped-call]
        params["connection_class"] = _reconnecting(params["connection_class"], self._filtered_answer)
        if params.get("socket_timeout") is None:
            params["socket_timeout"] = ANSWER_TIMEOUT_S
        return params

    def _filtered_answer(self, answer: Any) -> Any:
        """What kombu gets as the answer of Redis."""
        return answer

    def _size(self, queue: str) -> int:
        return int(self._repairing_queues([queue], super()._size, queue))

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        self._repairing_queues([queue], super()._put, queue, message, **options)

    def _queue_bind(self, exchange: str, *args: Any) -> None:
        try:
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]
        except Exception as error:
            if not is_wrong_type(error):
                raise
            self.put_keys_aside(((self.keyprefix_queue % exchange, "set"),))
            super()._queue_bind(exchange, *args)  # type: ignore[no-untyped-call]

    def _repairing_queues(
        self, queues: list[str], work: Callable[..., Any], *args: Any, **options: Any
    ) -> Any:
        """Do the work. If a queue is a key of a wrong type, put the key aside and do the work again."""
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


def _reconnecting(connection_class: Any, filter_answer: Callable[[Any], Any]) -> Any:
    """A subclass that raises `ConnectionError` if Redis temporarily rejects commands.

    Celery then connects again, to the current master; any other error would end the worker. `filter_answer`
    gets each answer of Redis and returns the answer for kombu.
    """

    class Reconnecting(connection_class):  # type: ignore[misc]  # a base known only at run time
        lacks_permission = False

        def connect(self, *args: Any, **options: Any) -> None:
            super().connect(*args, **options)
            at_fork(self)

        def start_afresh(self) -> None:
            """Close the inherited socket in a forked process. kombu would use the poller of its parent."""
            self._parser.on_disconnect()
            sock = vars(self).get("_sock")
            self._sock = None
            if sock is not None:
                sock.close()

        def read_response(self, *args: Any, **options: Any) -> Any:
            try:
                return filter_answer(super().read_response(*args, **options))
            except Exception as error:
                if is_permission_error(error):
                    self.lacks_permission = True
                    raise
                # A missing permission aborts the transaction, too. A new connection does not help: redis-py
                # raises the original error.
                is_refused = self.lacks_permission and is_aborted_transaction(error)
                self.lacks_permission = False
                if is_refused or not is_temporary_error(error):
                    raise
                self.disconnect()
                raise ConnectionError(f"Redis rejects commands for now: {error}") from error

    return Reconnecting


class PublishingTransport(redis.Transport):
    """kombu's Redis transport with the changes of this module."""

    Channel = PublishingChannel
    broken = BrokenItems()
    """Handles broken items. A worker replaces it with one that stores them."""


class SentinelPublishingChannel(PublishingChannel, redis.SentinelChannel):
    """The same channel, with connections to the current master."""


class SentinelPublishingTransport(PublishingTransport, redis.SentinelTransport):
    """The same transport for a broker behind sentinels."""

    Channel = SentinelPublishingChannel


_TRANSPORT = f"{__name__}:{PublishingTransport.__name__}"
TRANSPORTS = {
    "redis": _TRANSPORT,
    "rediss": _TRANSPORT,
    "sentinel": f"{__name__}:{SentinelPublishingTransport.__name__}",
}
"""The names of the transports by the kombu alias that they replace, which is the scheme of the broker URL.

kombu maps the scheme `redis+socket` to the alias `redis`.
"""
