"""A Redis that a starting worker cannot reach. The only place that says when it is no use to wait for it."""

from __future__ import annotations

from contextlib import closing

from openagents_worker.addresses import RedisAddress, Sentinels, address_of, is_redis_url
from openagents_worker.errors import RedisUnreachable
from openagents_worker.redaction import safe_url
from openagents_worker.settings import PREFIX, Settings
from openagents_worker.store.client import CONNECT_TIMEOUT_S, Cell, Store
from openagents_worker.store.redis_errors import TlsFailed, TlsMismatchSuspected
from openagents_worker.store.tls import TlsProblem, speaks_redis, speaks_tls, tls_alert

__all__ = ["lasting_problem", "lasting_problem_of_celery"]


def lasting_problem(error: RedisUnreachable, variable: str, url: str) -> TlsFailed | None:
    """What must be changed before this Redis can be reached; None where waiting may help.

    `variable` is the setting that names it, without its prefix.
    """
    if isinstance(error, TlsFailed):
        return TlsFailed(f"{PREFIX}{variable}: {error.message}", hint=error.hint)
    if isinstance(error, TlsMismatchSuspected) and (problem := _looked_at(address_of(url))):
        where = f"{PREFIX}{variable}: no connection with Redis at {safe_url(url)}"
        return TlsFailed(f"{where}: {problem.what}", hint=problem.hint)
    return None


def lasting_problem_of_celery(settings: Settings) -> TlsFailed | None:
    """The same of a broker and a result backend of their own: Celery would try for ever.

    One that is away is no problem here: Celery waits for it.
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


def _looked_at(address: RedisAddress | Sentinels) -> TlsProblem | None:
    """What is wrong with TLS where a server says nothing or hangs up; None where that is not why."""
    if isinstance(address, Sentinels) or not address.is_at_port:
        return None
    place = address.host, address.port
    if address.tls is None:
        if speaks_tls(*place, timeout_s=CONNECT_TIMEOUT_S):
            return TlsProblem("it speaks TLS", "such a URL begins with rediss:// (docs/redis.md)")
        return None
    if speaks_redis(*place, timeout_s=CONNECT_TIMEOUT_S):
        return TlsProblem("it does not speak TLS at this port", "such a URL begins with redis://")
    return tls_alert(address.tls, *place, timeout_s=CONNECT_TIMEOUT_S)
