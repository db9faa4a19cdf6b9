"""TTLs: the only place that checks whether each key expires exactly when its `life` in the key table says."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import redis

from openagents_worker.store.keys import Keys, KeySpec, spec_of

__all__ = ["ALWAYS_EXPIRING", "PERMANENT", "ttl_violations"]

PERMANENT = frozenset(
    {"workers", "watched", "silent", "agents", "fleet", "fleet_lag", "sent_again", "due", "sent", "index"}
    | {"indexes", "timeouts"}
)
ALWAYS_EXPIRING = frozenset(
    {"reply", "host", "looked", "gone", "false_alarms", "looks_off", "resend", "resend_seen"}
    | {"aside", "aside_said", "aside_key", "served"}
    | {"suspects", "lease_end", "lease_end_runs", "lost_leases"}
    | {"limits", "limit", "limit_calls", "limit_queue", "limit_tenants", "limit_called"}
    | {"message_ids", "recipients", "outbox", "outbox_tries", "worker_parts"}
    | {"definition", "definition_of"}
)
_LIVE_WITH_RUN = frozenset({"run", "facts", "decisions", "events", "journal", "children"})


def ttl_violations(url: str, prefix: str = "oa") -> list[str]:
    """Descriptions of keys whose TTL is wrong: keys of live runs that expire, other keys that never expire.

    For tests: it scans the whole database. A key's TTL and whether its owner is live are read in one
    transaction, so a run that ends during the scan is not reported.
    """
    with redis.Redis.from_url(url, decode_responses=True) as client:
        found: list[str] = []
        for key in sorted(set(client.scan_iter(f"{prefix}:*", count=1000))):
            known = spec_of(key, prefix)
            if known is None:
                found.append(f"{key}: not a key of this library")
                continue
            spec, owner = known
            ttl_ms, live = _look(client, Keys(prefix), key, spec, owner)
            if live and ttl_ms >= 0:
                found.append(f"{key}: would expire in {ttl_ms} ms, but its owner is live")
            if not live and ttl_ms == -1:
                found.append(f"{key}: never expires, but nothing live needs it ({spec.life})")
    return found


def _look(client: Any, keys: Keys, key: str, spec: KeySpec, owner: str) -> tuple[int, bool]:
    """The TTL of a key in ms, and whether it must not have one at present; both at one moment.

    `owner` is the encoded id in the key. A key that holds another type than it should has no live owner.
    """
    id_ = unquote(owner)
    transaction = client.pipeline(transaction=True)
    transaction.pttl(key)
    if spec.name in PERMANENT | ALWAYS_EXPIRING:
        pass
    elif spec.name.startswith("worker_"):
        transaction.zscore(keys("workers"), id_)
    elif spec.name in _LIVE_WITH_RUN:
        transaction.hget(keys("run", id_), "state")
    else:
        transaction.hexists(keys("session", id_), "holder")
        transaction.zcard(keys("session_queue", id_))
    ttl_ms, *replies = transaction.execute(raise_on_error=False)
    return ttl_ms, _is_live(
        spec, [None if isinstance(reply, redis.RedisError) else reply for reply in replies]
    )


def _is_live(spec: KeySpec, replies: list[Any]) -> bool:
    if spec.name in PERMANENT | ALWAYS_EXPIRING:
        return spec.name in PERMANENT
    if spec.name in _LIVE_WITH_RUN:
        return replies[0] not in (None, "completed", "failed", "cancelled")
    if spec.name.startswith("worker_"):
        return replies[0] is not None
    return any(replies)
