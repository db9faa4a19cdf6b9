"""Connections to the Redis of a URL. The only place that says it in redis-py's words."""

from __future__ import annotations

import codecs
import inspect
import ssl
from collections.abc import Mapping
from typing import Any, assert_never

import redis
import redis.asyncio as redis_async
from redis import exceptions

from openagents_worker.addresses import RedisAddress, Sentinels, address_of
from openagents_worker.errors import ConfigError, ConfigValidationError
from openagents_worker.redis_tls import Tls
from openagents_worker.store.sentinel import SENTINEL_TIMEOUT_S, AsyncMaster, AsyncToMaster, Master, ToMaster

__all__ = ["options_of", "reading_any_bytes"]

REDIS_PY_OF_RESP3 = 8  # it gives answers in RESP3 the shape of those in RESP2
DOCS = "docs/redis.md says how a Redis is addressed"


REPLACING = "openagents_text"


def reading_any_bytes() -> dict[str, Any]:
    """Answers as text, U+FFFD in the place of bytes that are not UTF-8: one field that another program has
    written keeps nobody from reading the others. What is sent has to be whole."""
    codecs.register_error(REPLACING, _replaced)
    return {"decode_responses": True, "encoding_errors": REPLACING}


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError):
        return "\ufffd", error.end
    raise error


def options_of(
    pool_class: Any, url: str, connect_timeout_s: float, answer_timeout_s: float | None
) -> dict[str, Any]:
    """What makes the connections of a pool go to this Redis, in place of a pool's other options.

    The time limits are those that the connections have where the URL says nothing; seconds.
    """
    address = _address(url)
    match address:
        case Sentinels():
            return _by_sentinels(pool_class, address, connect_timeout_s)
        case RedisAddress():
            return _at_server(pool_class, address, connect_timeout_s, answer_timeout_s)
        case _:
            assert_never(address)


def _address(url: str) -> RedisAddress | Sentinels:
    """Raises `ConfigValidationError` without the URL: a wrong one may hold a password anywhere."""
    try:
        return address_of(url)
    except ValueError as error:
        raise ConfigValidationError(f"the URL of Redis is not valid: {error}", hint=DOCS) from None


def _at_server(
    pool_class: Any, address: RedisAddress, connect_timeout_s: float, answer_timeout_s: float | None
) -> dict[str, Any]:
    """What makes a pool's connections go to this server. Its time limits shorten ours, and lengthen none."""
    is_async = issubclass(pool_class, redis_async.ConnectionPool)
    module: Any = redis_async.connection if is_async else redis.connection
    if not address.is_at_port:
        connection_class = module.UnixDomainSocketConnection
    else:
        connection_class = module.Connection if address.tls is None else module.SSLConnection
        if is_async and address.tls is not None:
            connection_class = _with_one_context(connection_class, address.tls)
    options = {"connection_class": connection_class, **address.redis_options()}
    _check_version(connection_class, options)
    if answer_timeout_s is not None and address.socket_timeout_s is not None:
        options["socket_timeout"] = min(answer_timeout_s, address.socket_timeout_s)
    if address.socket_connect_timeout_s is not None:
        options["socket_connect_timeout"] = min(connect_timeout_s, address.socket_connect_timeout_s)
    if address.health_check_interval_s is not None:
        options["health_check_interval"] = address.health_check_interval_s
    if address.client_name is not None:
        options["client_name"] = address.client_name
    return options


def _with_one_context(connection_class: Any, tls: Tls) -> Any:
    """The same connection class, all of whose connections share what a certificate is checked against.

    redis-py reads the system's authorities anew for each of them, on the loop: that takes tens of
    milliseconds, and a worker opens thirty connections at once.
    """

    class WithOneContext(connection_class):  # type: ignore[misc]  # a base known only at run time
        async def connect(self, *args: Any, **kwargs: Any) -> None:
            if not self.is_connected:
                self.ssl_context.context = _context_of(tls)
            await super().connect(*args, **kwargs)

    return WithOneContext


def _context_of(tls: Tls) -> ssl.SSLContext:
    try:
        return tls.context()
    except ValueError as error:  # a file was replaced by one that cannot be used
        raise exceptions.ConnectionError(f"no TLS: {error}") from error


def _check_version(connection_class: Any, options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an option that came with a newer redis-py than this one."""
    if options.get("protocol") == 3 and int(redis.__version__.partition(".")[0]) < REDIS_PY_OF_RESP3:
        raise ConfigError(
            f"the option protocol=3 of a Redis URL needs redis-py {REDIS_PY_OF_RESP3}; "
            f"this is {redis.__version__}",
            hint="leave it out: a connection that needs RESP3 asks for it itself",
        )
    known = {name for each in connection_class.__mro__ for name in inspect.signature(each).parameters}
    for name in options.keys() - known - {"connection_class"}:
        raise ConfigError(
            f"the option {name} of a Redis URL needs a newer redis-py than {redis.__version__}",
            hint="pip install --upgrade redis",
        )


def _by_sentinels(pool_class: Any, sentinels: Sentinels, connect_timeout_s: float) -> dict[str, Any]:
    """What makes a pool's connections ask for the master."""
    timeout_s = min(connect_timeout_s, SENTINEL_TIMEOUT_S)
    is_async = issubclass(pool_class, redis_async.ConnectionPool)
    return {
        "connection_class": AsyncToMaster if is_async else ToMaster,
        "connection_pool": (AsyncMaster if is_async else Master)(sentinels, timeout_s=timeout_s),
        "db": sentinels.db,
        **sentinels.login,
    }
