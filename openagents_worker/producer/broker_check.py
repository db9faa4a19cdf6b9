"""Broker check: the only place that finds out which broker an app has, and whether it answers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from celery import Celery

from openagents_worker.producer.app_binding import AppKind, find_binding
from openagents_worker.producer.publisher import publishing_connection
from openagents_worker.redaction import safe_text, safe_url
from openagents_worker.redis_url import address_of, redis_url_of_connection
from openagents_worker.settings import Settings

__all__ = ["BrokerAnswer", "ask_broker", "is_app_of_user", "with_broker_of"]


@dataclass(frozen=True, slots=True)
class BrokerAnswer:
    """The answer of a broker to a new connection. `where` is its URL without secrets.

    `problem` is what happened instead of an answer; None: it has answered.
    """

    where: str
    problem: str | None


def is_app_of_user(app: Celery) -> bool:
    """Whether the app was not made by this library: its broker is its own, not that of the settings."""
    binding = find_binding(app)
    return binding is None or binding.kind not in (AppKind.PRODUCER, AppKind.WORKER)


def with_broker_of(app: Celery, settings: Settings) -> Settings:
    """The settings with the Redis that is the broker of an app of the user.

    The URL is empty if the broker is not a Redis, if a URL cannot express it, or if the app sets a key
    prefix.
    """
    url, options = None, app.conf.broker_transport_options or {}
    if not options.get("global_keyprefix"):
        # Celery raises these two for a transport that it does not know, or whose library is missing.
        with suppress(KeyError, ImportError), app.connection_for_read() as connection:
            url = redis_url_of_connection(connection, options)
    if url and address_of(url).url == address_of(settings.redis_url).url:
        url = settings.redis_url
    return settings.model_copy(update={"broker_url": url or ""})


def ask_broker(app: Celery) -> BrokerAnswer:
    """Connect to the broker as a producer does, and log in.

    Each of several hosts of the URL is tried, for a second or two. Raises `BrokerConfigError` if Celery
    cannot use a broker of this kind.
    """
    urls = app.conf.broker_write_url or app.conf.broker_url or ""
    where = safe_url(urls if isinstance(urls, str) else ";".join(urls))
    connection = publishing_connection(app)
    tries_after_the_first = max(0, len(connection.alt or ()) - 1)
    try:
        connection.ensure_connection(
            max_retries=tries_after_the_first, interval_start=0, interval_step=0, interval_max=0
        )
    except Exception as error:  # noqa: BLE001 - each transport has its own errors
        return BrokerAnswer(where, f"{type(error.__cause__ or error).__name__}: {safe_text(str(error))}")
    finally:
        with suppress(Exception):  # a broken connection may not be closed in order
            connection.release()
    return BrokerAnswer(where, None)
