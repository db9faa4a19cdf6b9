"""The subscribed store. The only place with a connection whose life others can see: it listens to a channel.

The subscription is made while the connection is, before any command, and nothing is ever published in the
channel. So it has a subscriber exactly while this connection lives, also while its process is too busy to
speak. That takes RESP3, where commands and a subscription share a connection.
"""

from __future__ import annotations

import os
import re
import select
import threading
from typing import Any

from redis import exceptions

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.redis_clients import Line, is_connected
from openagents_worker.telemetry.logs import get_logger

__all__ = ["SubscribedStore"]

log = get_logger(__name__)

_RUN_ID = re.compile(r"^run_id:(\w+)", re.MULTILINE)


class SubscribedStore(Store):
    """A store with one connection, for one thread. `wake()` and `close()` may be called from any."""

    def __init__(self, cell: Cell, *, answer_timeout_s: float, connect_timeout_s: float) -> None:
        super().__init__(
            cell, max_connections=1, answer_timeout_s=answer_timeout_s, connect_timeout_s=connect_timeout_s
        )
        self._line = Line(connection_pool=self.redis.connection_pool)
        self.redis = self._line
        options = self._line.connection_pool.connection_kwargs
        options["redis_connect_func"] = self._on_connect
        self.connections = 0
        """How many there have been, one after the other."""
        self._channel = ""
        self._connection: Any = None
        self._server = ""
        self._has_said: set[str] = set()
        self._wakes, self._wake_end = os.pipe()
        self._closing = threading.Lock()
        self._is_closed = False

    def subscribe(self, channel: str) -> None:
        """Listen to this channel and to no other, from the next command on."""
        self._channel = channel
        self._disconnect()

    def connect(self) -> None:
        """Have a connection from now on; the next command would make it, too."""

        self.ask(lambda _: self._line.connect())

    def start_afresh(self) -> None:
        super().start_afresh()
        self._line.forget()

    @property
    def server(self) -> str:
        """The `run_id` of the server that was connected last, '' where it cannot see us listen."""
        return self._server

    @property
    def is_connected(self) -> bool:
        return is_connected(self._connection)

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until `wake()`, or until the connection is closed: True, and it is given up."""
        with self._closing:
            if self._is_closed:
                return False
        poll = select.poll()
        poll.register(self._wakes, select.POLLIN)
        if self.is_connected:
            poll.register(self._connection._sock, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(seconds, 0) * 1000)}
        if self._wakes in ready:
            os.read(self._wakes, 64)
        if not ready - {self._wakes}:
            return False
        # Nothing is to be read between two commands: it is closed, or somebody publishes in our channel.
        self._disconnect()
        return True

    def wake(self) -> None:
        """End the waiting of now, or the next one."""
        with self._closing:
            if not self._is_closed:
                os.write(self._wake_end, b"!")

    def close(self) -> None:
        super().close()
        with self._closing:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._wakes)
                os.close(self._wake_end)

    def _disconnect(self) -> None:
        self.redis.connection_pool.disconnect()

    # --- as a connection is made ---

    def _on_connect(self, connection: Any) -> None:
        self._connection, self._server = connection, ""
        self.connections += 1
        if self._speak_resp3(connection) and self._listen(connection):
            self._server = self._run_id(connection)

    def _speak_resp3(self, connection: Any) -> bool:
        connection.protocol = 3
        try:
            connection.on_connect()
        except exceptions.ResponseError as error:
            self._say("HELLO 3 is refused", error)
            connection.protocol = 2
            connection.on_connect()
            return False
        return True

    def _listen(self, connection: Any) -> bool:
        """The confirmation is a push message and no answer; the answer to PING comes after either."""
        connection.send_command("SUBSCRIBE", self._channel)
        connection.send_command("PING")
        try:
            connection.read_response()
        except exceptions.ResponseError as error:
            connection.read_response()
            self._say("SUBSCRIBE is refused", error)
            return False
        return True

    def _run_id(self, connection: Any) -> str:
        connection.send_command("INFO", "server")
        try:
            found = _RUN_ID.search(str(connection.read_response()))
        except exceptions.ResponseError as error:
            self._say("INFO is refused", error)
            return ""
        return found.group(1) if found else ""

    def _say(self, what: str, error: Exception) -> None:
        if what not in self._has_said:
            self._has_said.add(what)
            log.warning(
                "worker.connection_not_seen",
                reason=what,
                error=str(error),
                hint="if this worker dies, workers of other hosts notice it at the end of its lease",
            )
