"""Redis brokers. The only place that finds the Redis behind a broker URL or a connection of Celery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from openagents_worker.redis_tls import Tls
from openagents_worker.redis_url.address import is_by_sentinels, is_redis_url
from openagents_worker.redis_url.sentinels import Sentinels
from openagents_worker.redis_url.server import RedisAddress

__all__ = ["as_redis", "redis_url_of_connection"]


def as_redis(broker_url: str, options: Mapping[str, Any] | None = None) -> str | None:
    """The URL of the Redis that is the broker; None for another kind of broker.

    `options` are the options of Celery's transport.
    """
    if is_by_sentinels(broker_url):
        return _sentinel_url_of_celery(broker_url, options or {})
    return RedisAddress.of(broker_url).url if is_redis_url(broker_url) else None


def redis_url_of_connection(connection: Any, options: Mapping[str, Any]) -> str | None:
    """The URL of the Redis of a kombu connection, with its TLS options. None if a URL cannot express them.

    `options` are the options of Celery's transport.
    """
    hostname, alternatives = str(connection.hostname or ""), list(connection.alt or ())
    if is_by_sentinels(alternatives[0] if alternatives else connection.as_uri()):
        return _sentinel_url_of_celery(
            ";".join(alternatives) or connection.as_uri(include_password=True), options
        )
    if (
        len(alternatives) > 1
        or getattr(connection, "credential_provider", None)
        or callable(connection.password)
    ):
        return None
    if hostname.startswith("socket://"):
        try:
            return as_redis(f"redis+{hostname}")
        except ValueError:  # an option that only kombu supports
            return None
    if not is_redis_url(connection.as_uri()):
        return None
    tls = Tls.of_celery(connection.ssl) if isinstance(connection.ssl, Mapping) else None
    database = str(connection.virtual_host or "").strip("/") or "0"
    if (connection.ssl and tls is None) or not database.isdecimal():
        return None
    return RedisAddress(
        host=hostname or "localhost",
        port=int(connection.port or 6379),
        db=int(database),
        username=connection.userid or None,
        password=connection.password or None,
        tls=tls,
    ).url


def _sentinel_url_of_celery(url: str, options: Mapping[str, Any]) -> str | None:
    """The sentinels of Celery's broker as one URL of our form; None if they cannot be parsed."""
    try:
        sentinels = Sentinels.of(url, options.get("master_name"))
    except ValueError:
        return None
    login = options.get("sentinel_kwargs") or {}
    return replace(
        sentinels,
        sentinel_username=sentinels.sentinel_username or login.get("username"),
        sentinel_password=sentinels.sentinel_password or login.get("password"),
    ).url
