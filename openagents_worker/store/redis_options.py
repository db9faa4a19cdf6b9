"""Connection options: the only place that turns a Redis URL into options of a redis-py connection pool."""

from __future__ import annotations

import codecs
import inspect
import ssl
from collections.abc import Mapping
from typing import Any, assert_never

import redis
import redis.asyncio as redis_async
from redis import exceptions

from openagents_worker.errors import ConfigError, ConfigValidationError
from openagents_worker.redis_tls import Tls
from openagents_worker.redis_url import RedisAddress, Sentinels, address_of
from openagents_worker.store.sentinel import (
    SENTINEL_TIMEOUT_S,
    AsyncMasterFinder,
    AsyncSentinelConnection,
    MasterFinder,
    SentinelConnection,
)

__all__ = ["connection_options", "lossy_text_options"]

MIN_REDIS_PY_FOR_RESP3 = 8  # from then on, answers have the same shape in RESP3 as in RESP2
DOCS = "docs/redis.md describes Redis URLs"


ERROR_HANDLER = "openagents_text"


def lossy_text_options() -> dict[str, Any]:
    """Options for answers as text. Bytes that are not UTF-8 become U+FFFD.

    So one field that another program has written does not prevent the others from being read. Text that is
    sent must be valid: it raises `UnicodeEncodeError`.
    """
    codecs.register_error(ERROR_HANDLER, _replace_bytes)
    return {"decode_responses": True, "encoding_errors": ERROR_HANDLER}


def _replace_bytes(error: UnicodeError) -> tuple[str, int]:
    if isinstance(error, UnicodeDecodeError):
        return "\ufffd", error.end
    raise error


def connection_options(
    pool_class: Any, url: str, connect_timeout_s: float, answer_timeout_s: float | None
) -> dict[str, Any]:
    """The options with which a pool connects to the Redis of this URL. They override its other options.

    The time limits are in seconds. Time limits in the URL can only shorten them.
    """
    address = _address(url)
    match address:
        case Sentinels():
            return _sentinel_options(pool_class, address, connect_timeout_s)
        case RedisAddress():
            return _server_options(pool_class, address, connect_timeout_s, answer_timeout_s)
        case _:
            assert_never(address)


def _address(url: str) -> RedisAddress | Sentinels:
    """Parse the URL. The `ConfigValidationError` does not contain it: it may have a password anywhere."""
    try:
        return address_of(url)
    except ValueError as error:
        raise ConfigValidationError(f"the Redis URL is not valid: {error}", hint=DOCS) from None


def _server_options(
    pool_class: Any, address: RedisAddress, connect_timeout_s: float, answer_timeout_s: float | None
) -> dict[str, Any]:
    """The options for one server, without sentinels."""
    is_async = issubclass(pool_class, redis_async.ConnectionPool)
    module: Any = redis_async.connection if is_async else redis.connection
    if not address.is_at_port:
        connection_class = module.UnixDomainSocketConnection
    else:
        connection_class = module.Connection if address.tls is None else module.SSLConnection
        if is_async and address.tls is not None:
            connection_class = _with_shared_context(connection_class, address.tls)
    options = {"connection_class": connection_class, **address.redis_options()}
    _check_options_known(connection_class, options)
    if answer_timeout_s is not None and address.socket_timeout_s is not None:
        options["socket_timeout"] = min(answer_timeout_s, address.socket_timeout_s)
    if address.socket_connect_timeout_s is not None:
        options["socket_connect_timeout"] = min(connect_timeout_s, address.socket_connect_timeout_s)
    if address.health_check_interval_s is not None:
        options["health_check_interval"] = address.health_check_interval_s
    if address.client_name is not None:
        options["client_name"] = address.client_name
    return options


def _with_shared_context(connection_class: Any, tls: Tls) -> Any:
    """A subclass of a connection class whose connections share one TLS context.

    redis-py reads the certificate authorities of the system for each connection, on the event loop. This
    takes tens of milliseconds, and a worker opens thirty connections at once.
    """

    class WithSharedContext(connection_class):  # type: ignore[misc]  # a base known only at run time
        async def connect(self, *args: Any, **kwargs: Any) -> None:
            if not self.is_connected:
                self.ssl_context.context = _tls_context(tls)
            await super().connect(*args, **kwargs)

    return WithSharedContext


def _tls_context(tls: Tls) -> ssl.SSLContext:
    try:
        return tls.context()
    except ValueError as error:  # a certificate file was replaced by an invalid one
        raise exceptions.ConnectionError(f"TLS failed: {error}") from error


def _check_options_known(connection_class: Any, options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an option of the URL that the installed redis-py does not support."""
    if options.get("protocol") == 3 and int(redis.__version__.partition(".")[0]) < MIN_REDIS_PY_FOR_RESP3:
        raise ConfigError(
            f"the option protocol=3 of a Redis URL needs redis-py {MIN_REDIS_PY_FOR_RESP3}; "
            f"the installed version is {redis.__version__}",
            hint="remove the option: a connection that needs RESP3 requests it itself",
        )
    known = {name for each in connection_class.__mro__ for name in inspect.signature(each).parameters}
    for name in options.keys() - known - {"connection_class"}:
        raise ConfigError(
            f"the option {name} of a Redis URL needs a newer redis-py than {redis.__version__}",
            hint="run pip install --upgrade redis",
        )


def _sentinel_options(pool_class: Any, sentinels: Sentinels, connect_timeout_s: float) -> dict[str, Any]:
    """The options with which a pool asks the sentinels for the master."""
    timeout_s = min(connect_timeout_s, SENTINEL_TIMEOUT_S)
    is_async = issubclass(pool_class, redis_async.ConnectionPool)
    return {
        "connection_class": AsyncSentinelConnection if is_async else SentinelConnection,
        "connection_pool": (AsyncMasterFinder if is_async else MasterFinder)(sentinels, timeout_s=timeout_s),
        "db": sentinels.db,
        **sentinels.login,
    }
