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
    | {"message_ids", "recipients", "outbox", "outbox_tries"}
)
_LIVE_WITH_RUN = frozenset({"run", "facts", "events", "journal"})


def ttl_violations(url: str, prefix: str = "oa") -> list[str]:
    """Descriptions of keys whose TTL is wrong: keys of live runs that expire, other keys that never expire.

    For tests and for `doctor`: it scans the whole database.
    """
    with redis.Redis.from_url(url, decode_responses=True) as client:
        ttl_of = {key: client.pttl(key) for key in client.scan_iter(f"{prefix}:*", count=1000)}
        found: list[str] = []
        for key, ttl_ms in sorted(ttl_of.items()):
            known = spec_of(key, prefix)
            if known is None:
                found.append(f"{key}: not a key of this library")
                continue
            spec, owner = known
            live = _is_live(client, Keys(prefix), spec, owner)
            if live and ttl_ms >= 0:
                found.append(f"{key}: would expire in {ttl_ms} ms, but its owner is live")
            if not live and ttl_ms == -1:
                found.append(f"{key}: never expires, but nothing live needs it ({spec.life})")
    return found


def _is_live(client: Any, keys: Keys, spec: KeySpec, owner: str) -> bool:
    """Whether the key must not have a TTL at present. `owner` is the encoded id in the key."""
    if spec.name in PERMANENT:
        return True
    if spec.name in ALWAYS_EXPIRING:
        return False
    id_ = unquote(owner)
    if spec.name.startswith("worker_"):
        return client.zscore(keys("workers"), id_) is not None
    if spec.name in _LIVE_WITH_RUN:
        key = keys("run", id_)
        state = client.hget(key, "state") if client.type(key) == "hash" else None
        return state not in (None, "completed", "failed", "cancelled")
    return bool(client.hexists(keys("session", id_), "holder") or client.zcard(keys("session_queue", id_)))
