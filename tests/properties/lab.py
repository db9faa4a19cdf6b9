"""The laboratory: the only place that changes the time of a cell, reads all of it and restores it."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from hashlib import sha1
from typing import Any, TypeVar

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.facts import facts_as_text
from openagents_worker.store.lua_keys import with_keys_inline
from openagents_worker.store.scripts import Script, ScriptCall
from openagents_worker.store.states import states_as_text

__all__ = ["TICK_MS", "Entry", "Lab", "Snapshot", "View"]

T = TypeVar("T")

# Time passes in ticks. Every span is some ticks and a half, so the speed of a machine decides nothing.
TICK_MS = 600_000

_IN_TICKS = (
    ("FORCED_AFTER_MS = 5000", f"FORCED_AFTER_MS = {TICK_MS * 3 // 2}"),
    ("OVERDUE_AGAIN_MS = 1000", f"OVERDUE_AGAIN_MS = {TICK_MS // 2}"),
    ("EMPTY_WITHIN_MS = 60000", f"EMPTY_WITHIN_MS = {TICK_MS * 3 // 2}"),
    ("MOST_ALONE_MS = 600000", f"MOST_ALONE_MS = {TICK_MS * 5 // 2}"),
)

_READ = """
local readers = {
  hash = function(key) return redis.call('HGETALL', key) end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  set = function(key) return redis.call('SMEMBERS', key) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key) return redis.call('XRANGE', key, '-', '+') end,
  string = function(key) return redis.call('GET', key) end,
}
local all = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  all[#all + 1] = {key, kind, redis.call('PTTL', key), readers[kind](key)}
end
return all
"""

_LET_PASS = """
local ms = tonumber(ARGV[1])
local function earlier(key, by)
  if redis.call('TYPE', key).ok ~= 'zset' then return end
  local all = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do redis.call('ZADD', key, string.format('%.0f', all[i + 1] - by), all[i]) end
end
earlier(KEYS[1] .. ':workers', ms)
earlier(KEYS[1] .. ':due', ms)
earlier(KEYS[1] .. ':timeouts', ms)
earlier(KEYS[1] .. ':lost', ms)
earlier(KEYS[1] .. ':alone', ms)
earlier(KEYS[1] .. ':silent', ms)
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':false_alarms:*')) do earlier(key, ms) end
earlier(KEYS[1] .. ':limits', ms)
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':limit:*')) do
  if string.find(key, ':calle?[ds]$') then earlier(key, ms) end
  if redis.call('TYPE', key).ok == 'hash' then
    for field, by in pairs({next_us = ms * 1000, next_tokens_us = ms * 1000, blocked_until_ms = ms}) do
      local at = redis.call('HGET', key, field)
      if at then redis.call('HSET', key, field, string.format('%.0f', at - by)) end
    end
  end
end
local watched = redis.call('HGETALL', KEYS[1] .. ':watched')
for i = 1, #watched, 2 do
  local server, at = string.match(watched[i + 1], '^(%S+) (%d+)$')
  redis.call('HSET', KEYS[1] .. ':watched', watched[i], string.format('%s %.0f', server, at - ms))
end
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':sent:*')) do earlier(key, ms * 1000) end
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':resend:*')) do
  if redis.call('TYPE', key).ok == 'zset' then
    earlier(key, ms * 1000)
  else
    redis.call('SET', key, string.format('%.0f', redis.call('GET', key) - ms * 1000), 'KEEPTTL')
  end
end
for _, key in ipairs(redis.call('KEYS', KEYS[1] .. ':run:*')) do
  if redis.call('TYPE', key).ok == 'hash' then
    local at, times = string.match(redis.call('HGET', key, 'resent') or '', '^(%d+):(%d+)$')
    if at then redis.call('HSET', key, 'resent', string.format('%.0f:%s', at - ms * 1000, times)) end
    for _, field in ipairs({'due', 'claimed', 'expires', 'force_at'}) do
      local at = redis.call('HGET', key, field)
      if at then redis.call('HSET', key, field, string.format('%.0f', at - ms)) end
    end
  end
end
"""


@dataclass(frozen=True)
class Entry:
    """A key with its type, its TTL in ms (-1: none), and its content as Python values."""

    kind: str
    ttl_ms: int
    value: Any


View = dict[str, Entry]
Snapshot = list[tuple[str, int, bytes]]

_AS_PYTHON: dict[str, Callable[[Any], Any]] = {
    "hash": lambda flat: dict(zip(flat[::2], flat[1::2], strict=True)),
    "list": list,
    "set": set,
    "zset": lambda flat: dict(zip(flat[::2], map(float, flat[1::2]), strict=True)),
    "stream": lambda entries: [(id_, dict(zip(flat[::2], flat[1::2], strict=True))) for id_, flat in entries],
    "string": str,
}


class Lab:
    """One cell in a Redis that belongs to the test.

    Scripts use the clock of the server, which cannot be changed. So `let_pass` moves the stored times
    instead: every deadline, due time and send time becomes that much earlier. `altered` replaces texts in the
    scripts, which switches a guard off.
    """

    def __init__(
        self,
        url: str,
        altered: tuple[tuple[str, str], ...] = (),
        *,
        prefix: str = "oa",
        codec: PayloadCodec = PLAIN,
    ) -> None:
        self.store = Store(Cell(url, prefix, codec=codec))
        self.keys = self.store.keys
        self.redis: Any = self.store.redis
        self._raw: Any = Store(Cell(url)).redis
        self._raw.connection_pool.connection_kwargs["decode_responses"] = False
        self._altered = [(_as_loaded(old), _as_loaded(new)) for old, new in (*_IN_TICKS, *altered)]
        self._scripts: dict[str, Script] = {}
        self._listening = self.redis.pubsub()
        self._read = self.redis.register_script(_READ)
        self._let_pass = self.redis.register_script(_LET_PASS)

    def close(self) -> None:
        self._listening.close()
        self._raw.connection_pool.disconnect()
        self.store.close()

    def run(self, call: ScriptCall[T]) -> T:
        changed = replace(call, script=self._script(call.script))
        object.__setattr__(changed, "_encoded", call._encoded)  # a repeated call sends the same texts
        return self.store.run(changed)

    def read(self) -> View:
        """All keys, at one moment."""
        return {
            key: Entry(kind, ttl_ms, _AS_PYTHON[kind](value))
            for key, kind, ttl_ms, value in self._read(keys=[], args=[])
        }

    def let_pass(self, ms: int) -> None:
        """As if so much time had passed."""
        self._let_pass(keys=[self.store.cell.prefix], args=[ms])

    def now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds * 1000 + micros // 1000)

    def make_due(self, run_id: str) -> None:
        """As if the time for which this run is suspended were over."""
        due = self.keys("due")
        if (
            self.redis.zscore(due, run_id) is not None
            and self.redis.hget(self.keys("run", run_id), "state") == "retrying"
        ):
            now_ms = self.now_ms()
            self.redis.zadd(due, {run_id: now_ms})
            self.redis.hset(self.keys("run", run_id), "due", now_ms)

    def end_lease(self, incarnation: str, ticks_ago: int | None = None) -> None:
        """As if this worker had not renewed for slightly too long. By default, it is unknown for how long."""
        at_ms = 1.0
        if ticks_ago is not None:
            seconds, micros = self.redis.time()
            at_ms = seconds * 1000 + micros // 1000 - ticks_ago * TICK_MS
        self.redis.zadd(self.keys("workers"), {incarnation: at_ms}, xx=True)

    def listen(self, incarnation: str) -> None:
        """Open a connection that subscribes like the heartbeat of this incarnation."""
        channel = self.keys.alive(incarnation)
        if channel not in self._listening.channels:
            self._listening.subscribe(channel)
            self._confirmed("subscribe")

    def cut(self, *incarnations: str) -> None:
        """Close the subscriptions of these incarnations; without names, all of them."""
        channels = list(map(self.keys.alive, incarnations)) or list(self._listening.channels)
        for channel in channels:
            if channel in self._listening.channels:
                self._listening.unsubscribe(channel)
                self._confirmed("unsubscribe")

    def _confirmed(self, kind: str) -> None:
        """Wait for the confirmation: scripts run on another connection and must see the change."""
        while (self._listening.get_message(timeout=60) or {"type": "nothing"})["type"] != kind:
            continue

    def forget(self, run_id: str) -> None:
        """As if the record had expired; its wake-ups were removed days before."""
        self.redis.delete(
            *(self.keys(kind, run_id) for kind in ("run", "facts", "decisions", "events", "journal", "held"))
        )
        for key in self.redis.scan_iter(f"{self.store.cell.prefix}:sent:*"):
            self.redis.zrem(key, run_id)
        self.redis.zrem(self.keys("due"), run_id)
        self.redis.zrem(self.keys("timeouts"), run_id)

    def becomes_foreign(self, name: str, *ids: str) -> str:
        """As if another program had written this key, which must not exist. Returns the key."""
        key = self.keys(name, *ids)
        assert not self.redis.exists(key), f"{key} is in use"
        self.redis.set(key, "foreign", ex=3600)
        return key

    def clear(self) -> None:
        self.redis.flushall()
        self.cut()

    def snapshot(self) -> Snapshot:
        keys = [key.decode() for key in self._raw.keys("*")]
        with self._raw.pipeline() as pipe:
            for key in keys:
                pipe.pttl(key).dump(key)
            values = pipe.execute()
        return list(zip(keys, values[::2], values[1::2], strict=True))

    def restore(self, snapshot: Snapshot) -> None:
        """Later writes are lost, as if a server had died before it wrote its last second to disk."""
        with self._raw.pipeline() as pipe:
            pipe.flushall()
            for key, ttl_ms, value in snapshot:
                pipe.restore(key, max(ttl_ms, 0), value)
            pipe.execute()

    def _script(self, script: Script) -> Script:
        if script.name not in self._scripts:
            changed = copy(script)
            for old, new in self._altered:
                changed.source = changed.source.replace(old, new)
            changed.sha = sha1(changed.source.encode(), usedforsecurity=False).hexdigest()
            self._scripts[script.name] = changed
        return self._scripts[script.name]


def _as_loaded(lua: str) -> str:
    """A part of a script as it is sent to Redis."""
    return with_keys_inline(facts_as_text(states_as_text(lua)))
