"""A Redis that a starting worker cannot reach. The only place that says when it is no use to wait for it."""

from __future__ import annotations

from contextlib import closing

from openagents_worker.addresses import RedisAddress, Sentinels, address_of, is_redis_url
from openagents_worker.errors import RedisUnreachable
from openagents_worker.redaction import safe_url
from openagents_worker.settings import PREFIX, Settings
from openagents_worker.store.client import CONNECT_TIMEOUT_S, Cell, Store
from openagents_worker.store.failures import HungUpOn, TlsFailed
from openagents_worker.store.tls import speaks_tls

__all__ = ["lasting_problem", "lasting_problem_of_celery"]


def lasting_problem(error: RedisUnreachable, variable: str, url: str) -> TlsFailed | None:
    """What must be changed before this Redis can be reached; None where waiting may help.

    `variable` is the setting that names it, without its prefix.
    """
    if isinstance(error, TlsFailed):
        return TlsFailed(f"{PREFIX}{variable}: {error.message}", hint=error.hint)
    if isinstance(error, HungUpOn) and _wants_tls(address_of(url)):
        return TlsFailed(
            f"{PREFIX}{variable}: Redis at {safe_url(url)} wants TLS",
            hint="such a URL begins with rediss:// (docs/redis.md)",
        )
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


def _wants_tls(address: RedisAddress | Sentinels) -> bool:
    """Whether TLS is spoken where our URL says that it is not."""
    if isinstance(address, Sentinels) or not address.is_at_port or address.tls is not None:
        return False
    return speaks_tls(address.host, address.port, timeout_s=CONNECT_TIMEOUT_S)
