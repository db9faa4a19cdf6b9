"""TTLs: the only place that checks whether each key expires exactly when its `life` in the key table says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

import redis

from openagents_worker.store.keys import Keys, KeySpec, spec_of

__all__ = ["ALWAYS_EXPIRING", "PERMANENT", "ttl_violations"]

PERMANENT = frozenset(
    {"workers", "watched", "silent", "agents", "fleet", "fleet_lag", "sent_again", "due", "sent", "index"}
    | {"indexes", "timeouts", "stopping", "stopping_children", "data_id"}
)
ALWAYS_EXPIRING = frozenset(
    {"reply", "host", "looked", "gone", "false_alarms", "looks_off", "resend", "resend_seen"}
    | {"aside", "aside_said", "aside_key", "served"}
    | {"suspects", "alone", "lease_end", "lease_end_runs", "lost_leases"}
    | {"limits", "limit", "limit_calls", "limit_queue", "limit_tenants", "limit_called"}
    | {"message_ids", "recipients", "outbox", "outbox_tries", "worker_parts"}
    | {"definition", "definition_of"}
)
_LIVE_WITH_RUN = frozenset({"run", "facts", "decisions", "events", "journal", "children", "held"})


def ttl_violations(url: str, prefix: str = "oa") -> list[str]:
    """Descriptions of keys whose TTL is wrong: keys of live runs that expire, other keys that never expire.

    For tests: it scans the whole database. The TTLs of many keys, and whether their owners are live, are read
    in one transaction, so a run that ends during the scan is not reported.
    """
    with redis.Redis.from_url(url, decode_responses=True) as client:
        found: list[str] = []
        known: list[tuple[str, KeySpec, str]] = []
        for key in sorted(set(client.scan_iter(f"{prefix}:*", count=1000))):
            spec = spec_of(key, prefix)
            if spec is None:
                found.append(f"{key}: not a key of this library")
            else:
                known.append((key, *spec))
        for at in range(0, len(known), _KEYS_AT_ONCE):
            found += _violations(client, Keys(prefix), known[at : at + _KEYS_AT_ONCE])
    return found


_KEYS_AT_ONCE = 500


def _violations(client: Any, keys: Keys, known: Sequence[tuple[str, KeySpec, str]]) -> Iterator[str]:
    """What is wrong with these keys; each comes with its specification and the encoded id in it.

    A key that holds another type than it should has no live owner.
    """
    transaction = client.pipeline(transaction=True)
    ends = []
    for key, spec, owner in known:
        transaction.pttl(key)
        _ask_for_owner(transaction, keys, spec, unquote(owner))
        ends.append(len(transaction))
    replies = transaction.execute(raise_on_error=False)
    for (key, spec, _), begin, end in zip(known, [0, *ends], ends, strict=False):
        ttl_ms, *of_owner = replies[begin:end]
        live = _is_live(spec, [None if isinstance(one, redis.RedisError) else one for one in of_owner])
        if live and ttl_ms >= 0:
            yield f"{key}: would expire in {ttl_ms} ms, but its owner is live"
        if not live and ttl_ms == -1:
            yield f"{key}: never expires, but nothing live needs it ({spec.life})"


def _ask_for_owner(transaction: Any, keys: Keys, spec: KeySpec, id_: str) -> None:
    if spec.name in PERMANENT | ALWAYS_EXPIRING:
        pass
    elif spec.name.startswith("worker_"):
        transaction.zscore(keys("workers"), id_)
    elif spec.name in _LIVE_WITH_RUN:
        transaction.hget(keys("run", id_), "state")
    else:
        transaction.hexists(keys("session", id_), "holder")
        transaction.zcard(keys("session_queue", id_))


def _is_live(spec: KeySpec, replies: list[Any]) -> bool:
    if spec.name in PERMANENT | ALWAYS_EXPIRING:
        return spec.name in PERMANENT
    if spec.name in _LIVE_WITH_RUN:
        return replies[0] not in (None, "completed", "failed", "cancelled")
    if spec.name.startswith("worker_"):
        return replies[0] is not None
    return any(replies)
