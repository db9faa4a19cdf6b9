"""Redis URLs: from the URL of a user to a Redis server or sentinels, and to the forms of other libraries."""

from __future__ import annotations

from openagents_worker.redis_url.address import address_of, is_by_sentinels, is_redis_url
from openagents_worker.redis_url.celery_broker import as_redis, redis_url_of_connection
from openagents_worker.redis_url.options import SHORTEST_SOCKET_TIMEOUT_S, Scheme
from openagents_worker.redis_url.sentinels import Sentinels
from openagents_worker.redis_url.server import CeleryAddress, RedisAddress

__all__ = [
    "SHORTEST_SOCKET_TIMEOUT_S",
    "CeleryAddress",
    "RedisAddress",
    "Scheme",
    "Sentinels",
    "address_of",
    "as_redis",
    "is_by_sentinels",
    "is_redis_url",
    "redis_url_of_connection",
]
