"""Unreachable Redis: the only place that decides whether a starting worker should wait for Redis
or fail."""

from __future__ import annotations

from contextlib import closing

from openagents_worker.errors import RedisUnreachable
from openagents_worker.redaction import safe_url
from openagents_worker.redis_url import RedisAddress, Sentinels, address_of, is_redis_url
from openagents_worker.settings import PREFIX, Settings
from openagents_worker.store.client import CONNECT_TIMEOUT_S, Cell, Store
from openagents_worker.store.redis_errors import TlsFailed, TlsMismatchSuspected
from openagents_worker.store.tls import TlsProblem, speaks_redis, speaks_tls, tls_alert

__all__ = ["lasting_problem", "lasting_problem_of_celery"]


def lasting_problem(error: RedisUnreachable, variable: str, url: str) -> TlsFailed | None:
    """The configuration error that makes this Redis unreachable; None if waiting may help.

    `variable` is the setting with the URL, without its prefix.
    """
    if isinstance(error, TlsFailed):
        return TlsFailed(f"{PREFIX}{variable}: {error.message}", hint=error.hint)
    if isinstance(error, TlsMismatchSuspected) and (problem := _find_tls_problem(address_of(url))):
        where = f"{PREFIX}{variable}: no connection with Redis at {safe_url(url)}"
        return TlsFailed(f"{where}: {problem.what}", hint=problem.hint)
    return None


def lasting_problem_of_celery(settings: Settings) -> TlsFailed | None:
    """The configuration error of a separate broker or result backend: Celery itself would retry for ever.

    None if they are only down: Celery waits for them.
    """
    for variable, url in (("BROKER_URL", settings.broker_url), ("RESULT_BACKEND", settings.result_backend)):
        if not url or url == settings.redis_url or not is_redis_url(url):
            continue
        with closing(Store(Cell(url), max_connections=1)) as store:
            try:
                store.ask(lambda r: r.ping())
            except RedisUnreachable as error:
                if problem := lasting_problem(error, variable, url):
                    return problem
    return None


def _find_tls_problem(address: RedisAddress | Sentinels) -> TlsProblem | None:
    """The TLS error that explains why a server sends no reply or closes the connection; None if none does."""
    if isinstance(address, Sentinels) or not address.is_at_port:
        return None
    address_and_port = address.host, address.port
    if address.tls is None:
        if speaks_tls(*address_and_port, timeout_s=CONNECT_TIMEOUT_S):
            return TlsProblem("the server uses TLS", "the URL must begin with rediss:// (docs/redis.md)")
        return None
    if speaks_redis(*address_and_port, timeout_s=CONNECT_TIMEOUT_S):
        return TlsProblem("the server does not use TLS at this port", "the URL must begin with redis://")
    return tls_alert(address.tls, *address_and_port, timeout_s=CONNECT_TIMEOUT_S)
