"""Addresses. The only place that decides whether a URL names one Redis server or sentinels."""

from __future__ import annotations

from openagents_worker.redis_url.options import Scheme
from openagents_worker.redis_url.sentinels import Sentinels
from openagents_worker.redis_url.server import RedisAddress

__all__ = ["address_of", "is_by_sentinels", "is_redis_url"]


def is_by_sentinels(url: str) -> bool:
    return url.startswith("sentinel://")


def is_redis_url(url: str) -> bool:
    """Whether the scheme is one of a Redis; the rest of the URL may be wrong."""
    return url.partition("://")[0].strip().lower() in (*Scheme, "sentinel")


def address_of(url: str) -> RedisAddress | Sentinels:
    """The Redis of a URL. Raises `ValueError` with the reason and the right form."""
    return Sentinels.of(url) if is_by_sentinels(url) else RedisAddress.of(url)
