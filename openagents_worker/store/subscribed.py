"""The subscribed store: the only place that opens a connection whose end other processes can observe.

The connection subscribes to a channel as soon as it is open, and no message is ever published on this
channel. So the channel has a subscriber exactly as long as the connection exists, even if the process is too
busy to send anything. This needs RESP3, in which a subscription and commands can share a connection.
"""

from __future__ import annotations

import os
import re
import select
import threading
from typing import Any

from redis import exceptions

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.redis_clients import SingleConnectionClient, is_connected
from openagents_worker.telemetry.logs import get_logger

__all__ = ["SubscribedStore"]

log = get_logger(__name__)

_RUN_ID = re.compile(r"^run_id:(\w+)", re.MULTILINE)


class SubscribedStore(Store):
    """A store with one connection, for one thread. Any thread may call `wake()` and `close()`."""

    def __init__(self, cell: Cell, *, answer_timeout_s: float, connect_timeout_s: float) -> None:
        super().__init__(
            cell, max_connections=1, answer_timeout_s=answer_timeout_s, connect_timeout_s=connect_timeout_s
        )
        self._client = SingleConnectionClient(connection_pool=self.redis.connection_pool)
        self.redis = self._client
        options = self._client.connection_pool.connection_kwargs
        options["redis_connect_func"] = self._on_connect
        self.connections = 0
        """The number of connections that were opened so far, one after the other."""
        self._channel = ""
        self._connection: Any = None
        self._server = ""
        self._warned: set[str] = set()
        self._wake_read_fd, self._wake_write_fd = os.pipe()
        self._close_lock = threading.Lock()
        self._is_closed = False

    def subscribe(self, channel: str) -> None:
        """Subscribe to this channel from the next connection on. Closes the current connection."""
        self._channel = channel
        self._disconnect()

    def connect(self) -> None:
        """Open the connection now instead of at the next command."""

        self.ask(lambda _: self._client.connect())

    def start_afresh(self) -> None:
        super().start_afresh()
        self._client.forget()

    @property
    def server(self) -> str:
        """The `run_id` of the Redis server of the last connection; '' if the subscription was refused."""
        return self._server

    @property
    def is_connected(self) -> bool:
        return is_connected(self._connection)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until `wake()`. Returns True early if the server has closed the connection."""
        with self._close_lock:
            if self._is_closed:
                return False
        poll = select.poll()
        poll.register(self._wake_read_fd, select.POLLIN)
        if self.is_connected:
            poll.register(self._connection._sock, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(seconds, 0) * 1000)}
        if self._wake_read_fd in ready:
            os.read(self._wake_read_fd, 64)
        if not ready - {self._wake_read_fd}:
            return False
        # Between two commands there is nothing to read: the connection was closed, or another program
        # publishes on our channel.
        self._disconnect()
        return True

    def wake(self) -> None:
        """End the current call of `wait`, or the next one."""
        with self._close_lock:
            if not self._is_closed:
                os.write(self._wake_write_fd, b"!")

    def close(self) -> None:
        super().close()
        with self._close_lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._wake_read_fd)
                os.close(self._wake_write_fd)

    def _disconnect(self) -> None:
        self.redis.connection_pool.disconnect()

    # --- while a connection is opened ---

    def _on_connect(self, connection: Any) -> None:
        self._connection, self._server = connection, ""
        self.connections += 1
        if self._switch_to_resp3(connection) and self._subscribe_on_connect(connection):
            self._server = self._server_run_id(connection)

    def _switch_to_resp3(self, connection: Any) -> bool:
        connection.protocol = 3
        try:
            connection.on_connect()
        except exceptions.ResponseError as error:
            self._warn_once("HELLO 3 is refused", error)
            connection.protocol = 2
            connection.on_connect()
            return False
        return True

    def _subscribe_on_connect(self, connection: Any) -> bool:
        """Subscribe. The confirmation is a push message, not an answer, so PING is sent to get an answer."""
        connection.send_command("SUBSCRIBE", self._channel)
        connection.send_command("PING")
        try:
            connection.read_response()
        except exceptions.ResponseError as error:
            connection.read_response()
            self._warn_once("SUBSCRIBE is refused", error)
            return False
        return True

    def _server_run_id(self, connection: Any) -> str:
        connection.send_command("INFO", "server")
        try:
            found = _RUN_ID.search(str(connection.read_response()))
        except exceptions.ResponseError as error:
            self._warn_once("INFO is refused", error)
            return ""
        return found.group(1) if found else ""

    def _warn_once(self, what: str, error: Exception) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning(
                "worker.connection_not_seen",
                reason=what,
                error=str(error),
                hint="if this worker dies, the workers of other hosts notice it only at the end of its lease",
            )
