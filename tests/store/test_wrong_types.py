"""A key of the library with a wrong type: every kind of key, every other type, every script.

If the scripts can continue without the key, it is put aside. Otherwise, operations that need the key fail
with an error that names it. No write is partial.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Any

import pytest

from openagents_worker.errors import RedisWrongType
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.keys import ANY_TYPE, KEYS, LEFT_IN_PLACE, Keys, KeySpec, spec_of
from tests.support.script_calls import call

keys = Keys("oa")

WRITERS: dict[str, Callable[[Any, str], object]] = {
    "string": lambda redis, key: redis.set(key, "foreign"),
    "list": lambda redis, key: redis.rpush(key, "foreign"),
    "set": lambda redis, key: redis.sadd(key, "foreign"),
    "hash": lambda redis, key: redis.hset(key, "foreign", "foreign"),
    "zset": lambda redis, key: redis.zadd(key, {"foreign": 1}),
    "stream": lambda redis, key: redis.xadd(key, {"foreign": "1"}),
}
# The ids in keys that the history below uses.
IDS = {
    "run": "r1", "facts": "r1", "decisions": "r1", "message_ids": "r1", "events": "r1", "journal": "r1",
    "reply": "r1", "children": "r1", "held": "r1", "stopping_children": "1:1:r1",
    "session": "s1", "session_queue": "s1", "transcript": "s1", "artifacts": "s1", "session_state": "s1",
    "worker_runs": "w1", "worker_box": "w1", "worker_suspect": "w1", "worker_parts": "w1",
    "suspects": "w1", "lease_end": "w1",
    "lease_end_runs": "w1", "gone": "w1", "host": "h1", "false_alarms": "process", "looks_off": "connection",
    "sent": "q", "resend": "q", "resend_seen": "q", "index": "all", "aside_key": "x",
    "definition": "h", "definition_of": "h",
    "outbox": "billing", "outbox_tries": "billing",
    "limit": "k", "limit_calls": "k", "limit_queue": "k", "limit_tenants": "k", "limit_called": "k",
}  # fmt: skip
KINDS = [spec for spec in KEYS if spec.type != ANY_TYPE]
CASES = [(spec, kind) for spec in KINDS for kind in WRITERS if kind != spec.type]


@pytest.fixture
def store(redis_url: str) -> Generator[Store]:
    store = Store(Cell(redis_url))
    yield store
    store.redis.flushall()
    store.close()


def key_of(spec: KeySpec) -> str:
    return keys(spec.name, *([IDS[spec.name]] if "{}" in spec.template else []))


def whole_history(store: Store, n: str, meanwhile: Callable[[], object] = bool) -> list[str]:
    """What a deployment does in its life: run r1 of session s1, and beside it run `n` of a session of its
    own.

    `meanwhile` happens while both are executed. Returns what was refused. Whatever becomes of the first run,
    the second is executed to its end.
    """
    refused: list[str] = []

    def ask(name: str, **given: Any) -> Any:
        try:
            return store.run(call(name, **given))
        except RedisWrongType as error:
            refused.append(f"{name}: {error.key}")
            return None

    ask("register", host="h1", process="1 1", agents=["a", '{"queue":null}'], info="{}")
    ask("outbox_take")
    for run_id, session in (("r1", "s1"), (n, f"s-{n}")):
        ask("submit", run_id=run_id, session_id=session, tell=True)
    for run_id, session in ((f"{n}-late", f"s-{n}-late"), ("r1-late", "s1")):
        ask("submit", run_id=run_id, session_id=session, delay_ms=1)
    ask("renew", server="x", renewed_within_ms=1, parts="[]")
    ask("look", host="h1", joined="")
    claims = {run_id: ask("claim", run_id=run_id) for run_id in ("r1", n)}
    meanwhile()
    for run_id, claimed in claims.items():
        if claimed is None or claimed.answer is not scripts.ClaimAnswer.CLAIMED:
            assert run_id != n, f"{n} cannot be claimed: {claimed}"
            continue
        fence = claimed.fence
        written = [
            ask("emit", run_id=run_id, fence=fence),
            ask("commit", run_id=run_id, fence=fence, batch_no=2),
            ask("page", run_id=run_id),
            ask("limit_take", run_id=run_id, fence=fence, requests_per_minute=60, max_concurrency=9),
            ask("limit_settle", run_id=run_id, fence=fence, blocked_ms=1),
            ask("suspend", run_id=run_id, fence=fence, delay_ms=1, batch_no=3),
        ]
        assert run_id != n or None not in written, refused
        if store.redis.type(keys("due")) == "zset":
            store.redis.zadd(keys("due"), {run_id: 1}, xx=True)
        if store.redis.type(keys("run", run_id)) == "hash":
            store.redis.hset(keys("run", run_id), "due", 1)
        ask("limit_serve")
        ask("wake")
        ask("resend")
        ask("resend_unread")
        again = ask("claim", run_id=run_id)
        if again is not None and again.answer is scripts.ClaimAnswer.CLAIMED:
            ask("cancel", run_id=run_id)
            handed = ask("release", run_id=run_id, fence=again.fence, incarnation="w1")
            assert run_id != n or handed is not None
            again = ask("claim", run_id=run_id)
    other = f"{n}-other"
    assert ask("submit", run_id=other, session_id=f"s-{n}") is not None
    claimed = ask("claim", run_id=other)
    assert claimed is not None
    assert claimed.answer is scripts.ClaimAnswer.CLAIMED, claimed
    finished = ask("finish", run_id=other, fence=claimed.fence, artifacts=["{}"], state=["k", "1"])
    assert finished.answer is scripts.WriteAnswer.OK
    ask("confirm_completion", runs=[other, "1", "r1", "1"])
    ask("submit", run_id=f"{n}-dead", session_id=f"s-{n}")
    ask("claim", run_id=f"{n}-dead")
    ask("accuse", run_id=f"{n}-dead")
    ask("reclaim")
    ask("end_lease")
    ask("reclaim")
    ask("alarm")
    ask("prune")
    ask("reject", run_id=f"{n}-bad")
    ask("resume", run_id="r1", session_id="s1")
    ask("put_aside")
    ask("aside_news")
    ask("mend_key")
    ask("outbox_take")
    ask("outbox_done")
    ask("notify")
    ask("confirm_notices")
    ask("retire", host="h1")
    ask("delete_session", session_id="s1", even_if_not_notified=True)
    return refused


@pytest.mark.share(of=13)
@pytest.mark.parametrize(("spec", "kind"), CASES, ids=[f"{spec.name}-{kind}" for spec, kind in CASES])
def test_a_key_of_a_wrong_type_does_not_stop_other_runs(store: Store, spec: KeySpec, kind: str) -> None:
    """The other run is executed to its end, and a later one, too."""
    key = key_of(spec)
    WRITERS[kind](store.redis, key)

    refused = whole_history(store, "n1")

    assert all(line.endswith(f": {key}") for line in refused), refused
    if spec.name not in LEFT_IN_PLACE:
        assert refused == []
        assert whole_history(store, "n2") == []


@pytest.mark.share(of=4)
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.name)
def test_a_key_that_gets_a_wrong_type_does_not_stop_other_runs(store: Store, spec: KeySpec) -> None:
    """The same while the runs are executed: only the contents of the key are lost."""
    key, kind = key_of(spec), "string" if spec.type != "string" else "list"

    def becomes_foreign() -> None:
        store.redis.delete(key)
        WRITERS[kind](store.redis, key)

    # Without its lease, a worker can do nothing and registers again.
    refused = whole_history(store, "n1", becomes_foreign if spec.name != "workers" else bool)

    assert all(line.endswith(f": {key}") for line in refused), refused
    assert spec.name in LEFT_IN_PLACE or refused == []
    assert whole_history(store, "n2") == [] or spec.name in LEFT_IN_PLACE


def test_a_key_that_was_put_aside_can_be_read(store: Store) -> None:
    """The key has another name, and the list of dead letters has its name, the time and the reason."""
    store.redis.rpush("oa:due", "one", "two")
    store.run(call("wake"))

    [entry] = [json.loads(text) for text in store.redis.lrange("oa:aside", 0, -1)]

    assert (entry["key"], entry["code"]) == ("oa:due", "redis.wrong_type")
    assert "list" in entry["what"]
    assert store.redis.lrange(entry["moved_to"], 0, -1) == ["one", "two"]
    assert spec_of(entry["moved_to"], "oa") is not None
    assert store.redis.pttl(entry["moved_to"]) > 0


@pytest.mark.parametrize("name", ["journal", "facts", "transcript", "artifacts", "session_state"])
def test_a_run_that_needs_a_key_of_a_wrong_type_fails(store: Store, name: str) -> None:
    """It could never be claimed; so it fails with a code that names the key, and its session continues."""
    store.run(call("register"))
    store.run(call("submit"))
    store.run(call("submit", run_id="r2"))
    key = keys(name, IDS[name])
    store.redis.set(key, "foreign", ex=1000)

    done = store.run(call("claim"))

    result = json.loads(store.redis.hget(keys("run", "r1"), "result"))
    assert (done.answer, done.state) == (scripts.ClaimAnswer.DONE, "failed")
    assert result["error_details"]["code"] == "redis.wrong_type"
    assert key in result["error_details"]["message"]
    assert [wake.run_id for wake in done.wakes] == ["r2"]
    assert store.redis.get(key) == "foreign"


@pytest.mark.parametrize("name", ["transcript", "artifacts", "session_state"])
def test_finish_writes_everything_or_nothing(store: Store, name: str) -> None:
    """A key that gets a wrong type while the run executes is found before the first write."""
    store.run(call("register"))
    store.run(call("submit"))
    fence = store.run(call("claim")).fence
    store.redis.set(keys(name, "s1"), "foreign")
    before = {key: store.redis.dump(key) for key in store.redis.keys("*")}

    with pytest.raises(RedisWrongType) as error:
        store.run(call("finish", fence=fence, artifacts=["{}"], state=["k", "1"]))

    assert error.value.key == keys(name, "s1")
    assert {key: store.redis.dump(key) for key in store.redis.keys("*")} == before
