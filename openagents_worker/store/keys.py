"""The names of Redis keys: the only place that builds them from ids, and that recognises them.

All keys of a cell (one Redis, or one slot of a cluster) begin with the same prefix. On a cluster, the prefix
has the only hash tag (`oa:{c1}`), so every script is atomic over all keys of its cell. Ids in keys and
channels are percent-encoded, so an id cannot change the structure of a key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from openagents_worker.store.key_table import ANY_TYPE, KEYS, LEFT_IN_PLACE, KeySpec

__all__ = [
    "ANY_TYPE",
    "KEYS",
    "LEFT_IN_PLACE",
    "KeySpec",
    "Keys",
    "decode_id",
    "encode_id",
    "spec_of",
]


_SAFE = "-_.~"
_is_unreserved = re.compile(r"[A-Za-z0-9_.~-]*", re.ASCII).fullmatch


def encode_id(value: str) -> str:
    """The id for use in a key: all characters except letters, digits and `-_.~` are percent-encoded."""
    return value if _is_unreserved(value) else quote(value, safe=_SAFE)


def decode_id(encoded: str) -> str:
    """Reverse `encode_id`."""
    return unquote(encoded)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one cell."""

    prefix: str

    def __call__(self, name: str, *ids: str) -> str:
        """The key of this kind: `keys("run", run_id)`."""
        return f"{self.prefix}:{_TEMPLATES[name].format(*map(encode_id, ids))}"

    def channel(self, agent_id: str, session_id: str, run_id: str) -> str:
        """The pub/sub channel on which the events of a run are published."""
        return ":".join([self.prefix, "events", *map(encode_id, (agent_id, session_id, run_id))])

    def notices(self, incarnation: str) -> str:
        """The pub/sub channel for cancel requests to a worker, which it otherwise gets with its heartbeat."""
        return f"{self.prefix}:notices:{encode_id(incarnation)}"

    def alive(self, incarnation: str) -> str:
        """The pub/sub channel to which the heartbeat connection of a worker subscribes. It stays empty."""
        return f"{self.prefix}:alive:{encode_id(incarnation)}"


_TEMPLATES = {spec.name: spec.template for spec in KEYS}


_PATTERNS = [
    (spec, re.compile(re.escape(spec.template).replace(r"\{\}", "([^:]+)") + "$"))
    for spec in sorted(KEYS, key=lambda spec: -len(spec.template))
]


def spec_of(key: str, prefix: str) -> tuple[KeySpec, str] | None:
    """The kind of a key, and the encoded id in it. None if the key does not belong to the library."""
    for spec, pattern in _PATTERNS:
        if found := pattern.match(key, len(prefix) + 1):
            return spec, found.group(1) if pattern.groups else ""
    return None
