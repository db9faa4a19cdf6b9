"""Broker check: the only place that finds out whether the broker of an app answers, of any kind."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from celery import Celery

from openagents_worker.producer.publisher import publishing_connection
from openagents_worker.redaction import safe_text, safe_url

__all__ = ["BrokerAnswer", "ask_broker"]


@dataclass(frozen=True, slots=True)
class BrokerAnswer:
    """The answer of a broker to a new connection. `where` is its URL without secrets.

    `problem` is what happened instead of an answer; None: it has answered.
    """

    where: str
    problem: str | None


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
