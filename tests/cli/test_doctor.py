"""`doctor`: each finding is provoked, comes with what to do, and is gone afterwards."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import redis

from openagents_worker.agents.code import unregister_agents
from openagents_worker.cli.doctor import FindingKind
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from openagents_worker.store import scripts, server
from openagents_worker.store.dead_letters import put_key_aside
from openagents_worker.store.part_health import DATA_LOST, PartProblem, PartState, parts_json
from tests.cli.conftest import W1, Command, Done, node_of_a_cluster, register, retire, typed
from tests.support.lossy_proxy import silent_port
from tests.support.scripts import LEASE_MS, Hand
from tests.support.waiting import wait_for

AGENT = {
    "id": "clerk",
    "name": "clerk",
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
    "llm": {"provider": "mock", "model": "m"},
}


STATUS, TOP = ("status", "--json"), ("top", "--json", "--count", "1")


def found(done: Done, subject: str) -> list[tuple[str, str]]:
    """FindingKind and text of the findings about a subject."""
    return [(one["kind"], one["text"]) for one in done.json["findings"] if one["subject"] == subject]


def problem(done: Done, subject: str) -> dict[str, Any]:
    """The only problem about a subject. It comes with what to do."""
    [one] = [one for one in done.json["findings"] if (one["kind"], one["subject"]) == ("problem", subject)]
    assert one["todo"]
    return dict(one)


@pytest.fixture
def doctor(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`openagents-worker doctor --json` in an empty folder, without variables of Flower."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAGENTS_CONFIG", raising=False)
    for name in ("FLOWER_ADDRESS", "FLOWER_BASIC_AUTH", "FLOWER_UNAUTHENTICATED_API"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: command("doctor", "--json", *arguments)


def define(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **more: Any) -> None:
    (tmp_path / "agents.json").write_text(json.dumps({"version": "1.0", "agents": [{**AGENT, **more}]}))
    monkeypatch.setenv("OPENAGENTS_CONFIG", str(tmp_path / "agents.json"))


@pytest.fixture
def durable(tmp_path_factory: pytest.TempPathFactory) -> Generator[EmbeddedRedis]:
    """A Redis that writes to its disk, and whose settings a test may change."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture
def admin(durable: EmbeddedRedis) -> Generator[redis.Redis]:
    with redis.Redis.from_url(durable.url) as client:
        yield client


@pytest.fixture
def examined(
    doctor: Command,
    durable: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Done]:
    """`doctor` at the durable Redis, with a worker there."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", durable.url)
    with Client(durable.url) as client:
        register(client, agents=("clerk",))
    return lambda *arguments: typed(["doctor", "--json", *arguments], monkeypatch, capsys)


def test_a_healthy_deployment_has_no_problem(
    examined: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Exit code 0; each subject says what was looked at."""
    define(monkeypatch, tmp_path)

    done = examined()

    assert [one for one in done.json["findings"] if one["kind"] != "ok"] == []
    assert {one["subject"] for one in done.json["findings"]} == {"agents", "redis", "rights", "workers"}
    assert done.code == 0


def test_the_text_names_the_problem_and_what_to_do(command: Command, doctor: Command) -> None:
    """A line each, and below a problem what to do."""
    done = command("doctor")
    lines = done.out.splitlines()
    place = next(n for n, line in enumerate(lines) if "no worker is alive" in line)
    assert lines[place].startswith("problem  workers  ")
    assert lines[place + 1].strip() == "start one: openagents-worker worker"
    assert done.code == 2


def test_no_redis(doctor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding, and the exit code of no Redis."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", "redis://127.0.0.1:1/0")
    done = doctor()
    assert problem_text(done, "redis").startswith(
        "redis.unreachable: cannot reach Redis at redis://127.0.0.1:1/0"
    )
    assert done.code == 4


def problem_text(done: Done, subject: str) -> str:
    return str(problem(done, subject)["text"])


def test_a_wrong_setting(doctor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding: it is not a problem of Redis, too."""
    monkeypatch.setenv("OPENAGENTS_LEASE_MS", "soon")
    done = doctor()
    assert "OPENAGENTS_LEASE_MS" in problem_text(done, "settings")
    assert len(done.json["findings"]) == 1
    assert done.code == 2


# --- agents ------------------------------------------------------------------------------------------------


def test_a_missing_key_and_a_mistake_in_the_agents_file(
    doctor: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each with its line, and what to do."""
    monkeypatch.delenv("SHOP_KEY", raising=False)
    llm = {"provider": "openai_compatible", "model": "m", "api_key_env": "SHOP_KEY"}
    define(monkeypatch, tmp_path, llm=llm, tools=[{"id": "calc", "type": "calk"}])

    texts = [text for kind, text in found(doctor(), "agents") if kind == FindingKind.PROBLEM]

    assert any("the environment variable SHOP_KEY is not set" in text for text in texts)
    assert any("calk" in text for text in texts)


def test_a_key_that_only_the_workers_have_is_a_note(
    examined: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside `dev` with its scripted model, and where an operator has no keys. A worker does not serve an
    agent whose key is missing."""
    monkeypatch.delenv("SHOP_KEY", raising=False)
    llm = {"provider": "openai_compatible", "model": "m", "api_key_env": "SHOP_KEY"}
    define(monkeypatch, tmp_path, llm=llm)
    done = examined()
    [(kind, text)] = found(done, "agents")
    assert (kind, done.code) == ("note", 0)
    assert text.endswith("the environment variable SHOP_KEY is not set here, but a worker serves the agent")

    define(monkeypatch, tmp_path, llm=llm, id="other")
    assert "SHOP_KEY is not set" in problem_text(examined(), "agents")


def test_a_problem_of_an_agent_in_python_names_its_place(
    doctor: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("SHOP_KEY", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    llm = {"provider": "openai_compatible", "model": "m", "api_key_env": "SHOP_KEY"}
    (tmp_path / "agents_of_shop.py").write_text(
        f"from openagents_worker import Agent, register_agent\nregister_agent(Agent('porter', llm={llm}))\n"
    )
    monkeypatch.setenv("OPENAGENTS_IMPORTS", "agents_of_shop")
    try:
        text = problem_text(doctor(), "agents")
    finally:
        unregister_agents("porter")
    assert text.startswith("the agent 'porter' at ")
    assert "SHOP_KEY is not set" in text


def test_a_machine_without_agents_is_a_producers(doctor: Command) -> None:
    [(kind, text)] = found(doctor(), "agents")
    assert (kind, "only workers need them" in text) == ("note", True)


# --- Redis -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("maxmemory", "kind"), [("1gb", FindingKind.PROBLEM), ("0", FindingKind.NOTE)])
def test_a_redis_that_evicts(
    examined: Command, admin: redis.Redis, maxmemory: str, kind: FindingKind
) -> None:
    """--fix sets the policy; without a limit nothing is evicted yet."""
    admin.config_set("maxmemory", maxmemory)
    admin.config_set("maxmemory-policy", "allkeys-lru")

    assert (kind, "Redis deletes runs when its memory is full: maxmemory-policy allkeys-lru") in found(
        examined(), "redis"
    )
    fixed = examined("--fix")

    assert fixed.code == 0
    assert any(text.startswith("fixed: ") for _, text in found(fixed, "redis"))
    assert admin.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert not any("memory" in text for _, text in found(examined(), "redis"))


def test_a_redis_that_loses_runs_at_a_restart(examined: Command, admin: redis.Redis) -> None:
    """--fix turns the append-only file on."""
    admin.config_set("appendonly", "no")
    admin.config_set("save", "")
    assert problem_text(examined(), "redis").startswith("a restart of Redis loses every run")

    assert examined("--fix").code == 0
    assert admin.config_get("appendonly") == {"appendonly": "yes"}
    assert examined().code == 0


@pytest.mark.parametrize(
    ("save", "refused", "text"),
    [
        ("3600 1", "", "loses every run since its last snapshot: appendonly is off"),
        ("", "", "loses every run: appendonly is off, and it writes no snapshots"),
        ("3600 1", "-config", "loses every run since its last snapshot, or every run if it writes none"),
    ],
)
def test_what_is_lost_without_an_append_only_file(
    examined: Command,
    durable: EmbeddedRedis,
    admin: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    save: str,
    refused: str,
    text: str,
) -> None:
    """A hosted Redis often refuses CONFIG: then nobody knows whether it writes snapshots."""
    admin.config_set("appendonly", "no")
    admin.config_set("save", save)
    admin.acl_setuser("poor", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"])
    admin.execute_command("ACL", "SETUSER", "poor", "+@all", *filter(None, [refused]))
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", durable.url.replace("//", "//poor:x@"))

    assert text in problem_text(examined(), "redis")


def test_the_redis_of_dev_ends_with_dev(
    doctor: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps nothing on disk, on purpose: a note says how to keep the data. There is nothing to fix."""
    with EmbeddedRedis() as started, Client(started.url) as client:
        monkeypatch.setenv("OPENAGENTS_REDIS_URL", started.url)
        register(client, agents=("clerk",))
        done = typed(["doctor", "--json", "--fix"], monkeypatch, capsys)
        with redis.Redis.from_url(started.url) as of_dev:
            assert of_dev.config_get("appendonly") == {"appendonly": "no"}

    [note] = [one for one in done.json["findings"] if (one["kind"], one["subject"]) == ("note", "redis")]
    assert "the Redis of `openagents-worker dev`" in note["text"]
    assert "--data-dir" in note["todo"]
    assert done.code == 0


def test_strict_durability_that_redis_cannot_give(
    examined: Command, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAGENTS_DURABILITY", "strict")
    admin.config_set("appendfsync", "no")
    assert problem_text(examined(), "redis").startswith("redis.unsafe: ")


def test_a_redis_that_is_almost_full(examined: Command, admin: redis.Redis) -> None:
    used = int(admin.info("memory")["used_memory"])
    admin.config_set("maxmemory", used + used // 10)
    full = problem(examined(), "redis")
    text = full["text"]
    assert re.match(r"[89]\d % of the memory is in use \(.* bytes\): a full Redis accepts no runs", text), (
        text
    )
    assert "openagents-worker delete-session SESSION" in full["todo"], "ended runs keep their time to live"


@pytest.mark.parametrize("share", [0.9, 0.01])
def test_a_redis_that_is_full(examined: Command, admin: redis.Redis, share: float) -> None:
    """It may use more than `maxmemory`, by any factor: there is no percentage then."""
    limit = int(int(admin.info("memory")["used_memory"]) * share)
    admin.config_set("maxmemory", limit)
    text = problem_text(examined(), "redis")
    assert text.startswith("the memory of Redis is full, so it accepts no runs: "), text
    assert text.endswith(f" bytes are in use, and maxmemory is {limit:,} bytes")
    assert "%" not in text


def test_a_full_redis_that_evicts(admin: redis.Redis, examined: Command) -> None:
    """It accepts runs, and deletes others."""
    admin.config_set("maxmemory-policy", "volatile-lru")
    admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) // 2)
    texts = [text for kind, text in found(examined(), "redis") if kind == FindingKind.PROBLEM]
    assert any(text.startswith("the memory of Redis is full, so it deletes runs: ") for text in texts), texts


def test_a_redis_that_has_lost_its_data(examined: Command, durable: EmbeddedRedis) -> None:
    """Reported by a worker that was registered before; the runs of that time are gone."""
    lost = PartProblem("heartbeat", PartState.RECOVERED, 60.0, 0, DATA_LOST)
    with Client(durable.url) as client:
        beat = scripts.renew(incarnation=W1, lease_ms=LEASE_MS, parts=parts_json([lost]))
        client.store.run(beat)

    done = examined()

    [(kind, text)] = [one for one in found(done, "redis") if one[0] != "ok"]
    assert (kind, done.code) == ("note", 0)
    assert text.startswith("Redis has lost its data, at ")


def test_a_replica(examined: Command, admin: redis.Redis) -> None:
    """It still answers reads."""
    admin.config_set("replica-serve-stale-data", "yes")
    admin.replicaof("127.0.0.1", "1")
    try:
        assert problem_text(examined(), "redis").startswith("this Redis is a replica")
    finally:
        admin.replicaof("no", "one")


def test_a_user_without_the_right_to_ask(
    examined: Command, durable: EmbeddedRedis, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be asked is a note, with what to look at."""
    admin.acl_setuser("poor", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"])
    admin.execute_command("ACL", "SETUSER", "poor", "-info", "-config")
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", durable.url.replace("//", "//poor:x@"))

    done = examined()

    [(kind, text)] = [one for one in found(done, "redis") if one[0] != "ok"]
    assert (kind, "may not ask" in text) == ("note", True)
    assert done.code == 0


def test_a_user_without_a_right_of_a_worker(
    examined: Command,
    durable: EmbeddedRedis,
    admin: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Only where agents are defined: elsewhere no worker runs."""
    define(monkeypatch, tmp_path)
    admin.acl_setuser("poor", enabled=True, nopass=True, keys=["*"], channels=["*"], categories=["+@all"])
    admin.execute_command("ACL", "SETUSER", "poor", "-xadd")
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", durable.url.replace("//", "//poor:x@"))

    assert "redis.no_permission: " in problem_text(examined(), "rights")
    monkeypatch.delenv("OPENAGENTS_CONFIG")
    assert found(examined(), "rights") == []


def test_a_broker_that_does_not_answer(
    examined: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is named as the broker, and the checks after it are made."""
    define(monkeypatch, tmp_path)
    monkeypatch.setenv("OPENAGENTS_BROKER_URL", "redis://127.0.0.1:1/0")

    done = examined()

    broker = problem(done, "broker")
    assert broker["text"].startswith("redis.unreachable: cannot reach Redis at redis://127.0.0.1:1/0")
    assert "OPENAGENTS_BROKER_URL" in broker["todo"]
    assert found(done, "workers") == [("ok", "1 worker is alive, with 0 active runs")]
    assert done.code == 2


def test_another_broker_that_answers(examined: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kind it is: the check is Celery's own connection."""
    monkeypatch.setenv("OPENAGENTS_BROKER_URL", "memory://")
    done = examined()
    [(kind, text)] = found(done, "broker")
    assert (kind, text, done.code) == ("ok", "memory:// answers", 0)


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
@pytest.mark.parametrize("is_silent", [False, True], ids=["closed", "silent"])
def test_another_broker_that_does_not_answer(
    examined: Command, monkeypatch: pytest.MonkeyPatch, scheme: str, is_silent: bool
) -> None:
    """Also on the machine of a producer, and if the port is open: the checks after it are made."""
    with silent_port() as silent:
        port = silent if is_silent else 1
        monkeypatch.setenv("OPENAGENTS_BROKER_URL", f"{scheme}://guest:hush@127.0.0.1:{port}/0")
        done = examined()

    broker = problem(done, "broker")
    assert broker["text"].startswith(f"the broker of Celery does not answer at {scheme}://")
    assert f"127.0.0.1:{port}" in broker["text"]
    assert ("refused" in broker["text"]) is not is_silent, broker["text"]
    assert "OPENAGENTS_BROKER_URL" in broker["todo"]
    assert "hush" not in done.out
    assert found(done, "workers") == [("ok", "1 worker is alive, with 0 active runs")]
    assert done.code == 2


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Callable[[str], str]]:
    """An app with runs, with the broker at this URL; returns its place for `-A`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(broker: str) -> str:
        (tmp_path / "shop_of_doctor.py").write_text(
            "from celery import Celery\nfrom openagents_worker import register\n"
            f"app = Celery('shop', broker={broker!r}, set_as_current=False)\nregister(app)\n"
        )
        return "shop_of_doctor:app"

    yield write
    if module := sys.modules.pop("shop_of_doctor", None):
        module.app.close()


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
@pytest.mark.parametrize("has_agents", [True, False], ids=["worker", "producer"])
def test_the_broker_of_an_app_that_does_not_answer(
    examined: Command,
    shop: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    scheme: str,
    has_agents: bool,
) -> None:
    """`-A`: the broker is that of the app, whatever the environment says."""
    if has_agents:
        define(monkeypatch, tmp_path)

    done = examined("-A", shop(f"{scheme}://guest:hush@127.0.0.1:1/0"))

    broker = problem(done, "broker")
    assert "127.0.0.1:1/0" in broker["text"]
    assert "broker_url of the app" in broker["todo"]
    assert "hush" not in done.out
    assert found(done, "workers") == [("ok", "1 worker is alive, with 0 active runs")]
    assert done.code == 2


@pytest.mark.parametrize("db", [0, 1], ids=["the Redis of the runs", "another database"])
def test_the_broker_of_an_app_that_answers(
    examined: Command,
    shop: Callable[[str], str],
    durable: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    db: int,
) -> None:
    """A Redis is checked with the rights of the worker."""
    define(monkeypatch, tmp_path)
    monkeypatch.setenv("OPENAGENTS_BROKER_URL", "redis://127.0.0.1:1/0")

    done = examined("-A", shop(f"redis://127.0.0.1:{durable.port}/{db}"))

    assert [one for one in done.json["findings"] if one["kind"] != "ok"] == []
    assert found(done, "rights") == [("ok", "the Redis user has all rights of a worker")]


def test_a_broker_that_celery_cannot_use(examined: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport is unknown, or its library is missing."""
    monkeypatch.setenv("OPENAGENTS_BROKER_URL", "nothing://127.0.0.1:1/0")
    assert problem_text(examined(), "broker").startswith("config.broker: Celery cannot use the broker")


def test_clocks_that_differ(examined: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than a second, in which direction."""
    real = server.time.time
    monkeypatch.setattr(server.time, "time", lambda: real() + 90)
    [(kind, text)] = found(examined(), "clock")
    assert (kind, "90.0 s behind that of this machine" in text) == ("note", True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16 is too old"),
        ({"cluster_enabled": 1}, "this Redis is a node of a Redis Cluster"),
        ({"aof_last_write_status": "err"}, "the last write to the disk failed"),
        ({"rdb_last_bgsave_status": "err"}, "the last write to the disk failed"),
    ],
)
def test_what_another_redis_says(
    examined: Command, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], text: str
) -> None:
    """Answers of INFO that this Redis cannot be brought to give."""
    real = server._fields
    monkeypatch.setattr(server, "_fields", lambda answer: {**real(answer), **fields})
    assert problem_text(examined(), "redis").startswith(text)


@pytest.mark.parametrize(
    ("prefix", "broker", "text"),
    [
        ("oa", "", "the keys of a run would lie on several nodes"),
        ("oa:{c1}", "", "which cannot be the broker of Celery"),
        ("oa:{c1}", "redis://127.0.0.1:1/0", None),
    ],
)
def test_a_slot_of_a_cluster_can_be_a_cell(
    doctor: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    prefix: str,
    broker: str,
    text: str | None,
) -> None:
    """With a hash tag in the prefix, and with another broker (docs/scaling.md)."""
    with node_of_a_cluster() as node:
        with redis.Redis.from_url(node.url) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_for(lambda: admin.execute_command("CLUSTER INFO")["cluster_state"] == "ok", "it is up")
        monkeypatch.setenv("OPENAGENTS_REDIS_URL", node.url)
        monkeypatch.setenv("OPENAGENTS_KEY_PREFIX", prefix)
        monkeypatch.setenv("OPENAGENTS_BROKER_URL", broker)
        done = typed(["doctor", "--json"], monkeypatch, capsys)

    problems = [each for kind, each in found(done, "redis") if kind == FindingKind.PROBLEM]
    assert problems == ([] if text is None else [problems[0]])
    assert text is None or text in problems[0]


# --- workers, queues, Flower -------------------------------------------------------------------------------


def test_no_worker_and_runs_that_wait(doctor: Command, client: Client) -> None:
    register(client, agents=("clerk",), queues=("orders",))
    client.submit({"agent_id": "clerk", "session_id": "s1", "input_text": "hi", "run_id": "r1"})
    texts = [text for kind, text in found(doctor(), "workers") if kind == FindingKind.PROBLEM]
    assert any(text.startswith("1 run waits in queue agents") for text in texts)
    retire(client)
    client.cancel("r1")
    assert any(text.startswith("no worker is alive") for _, text in found(doctor(), "workers"))


def test_a_queue_that_agents_use_and_no_worker_consumes(
    doctor: Command, client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the first run waits in it."""
    define(monkeypatch, tmp_path, queue="reports")
    register(client, agents=("clerk",))
    assert problem_text(doctor(), "queues").startswith("no worker serves queue reports: 1 worker is alive")
    retire(client)


def test_an_agent_that_was_taken_out_of_the_agents_file_is_no_problem(
    command: Command, doctor: Command, client: Client
) -> None:
    """Unless one of its runs has not ended. `status`, `top` and `doctor` say the same."""
    register(client, agents=("clerk", "removed"))
    register(client, agents=("clerk",))

    def problems() -> list[list[str]]:
        texts = [text for kind, text in found(doctor(), "workers") if kind == FindingKind.PROBLEM]
        return [texts, *(command(*words).json["problems"] for words in (STATUS, TOP))]

    assert problems() == [[], [], []]
    client.submit({"agent_id": "removed", "session_id": "s1", "input_text": "hi", "run_id": "r1"})
    assert all("no worker serves the agent removed" in texts[0] for texts in problems())
    client.cancel("r1")
    assert problems() == [[], [], []]
    retire(client)


def test_an_item_that_was_put_aside_is_shown_by_status(doctor: Command, client: Client) -> None:
    """There is no list below the finding, as there is in `status`."""
    register(client, agents=("clerk",))
    client.store.redis.set(client.store.keys("due"), "text", ex=60)
    client.store.execute(put_key_aside(client.store.keys, client.store.keys("due")))

    aside = problem(doctor(), "workers")

    assert aside["text"].startswith("1 item was put aside, because no worker could read the data: oa:due")
    assert aside["todo"] == "openagents-worker status shows more"
    retire(client)


def test_a_worker_that_is_gone_with_its_runs(doctor: Command, client: Client, hand: Hand) -> None:
    """Its lease has expired, and nobody has taken its run."""
    hand.submit("r1")
    hand.claim("r1")
    client.store.redis.zadd(client.store.keys("workers"), {hand.incarnation: 1})
    texts = [text for kind, text in found(doctor(), "workers") if kind == FindingKind.PROBLEM]
    assert any("is gone, and no other worker has taken over its run yet" in text for text in texts)


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"FLOWER_ADDRESS": "0.0.0.0"}, "Flower would listen on 0.0.0.0 without a password"),  # noqa: S104
        ({"FLOWER_UNAUTHENTICATED_API": "true"}, "everybody who reaches Flower can revoke runs"),
    ],
)
def test_an_unsafe_flower(
    doctor: Command, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    """A password makes it safe."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert problem_text(doctor(), "flower").startswith(text)
    monkeypatch.setenv("FLOWER_BASIC_AUTH", "ada:secret")
    assert found(doctor(), "flower") == []
