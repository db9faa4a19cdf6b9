"""`resume`, `workers` and `status`: the commands that an operator needs after a failure."""

from __future__ import annotations

import json

import pytest

from openagents_worker.errors import LLMRateLimitError, LLMResponseError, RedisUnreachable
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.store import scripts
from openagents_worker.store.part_health import PartProblem, PartState, parts_json
from openagents_worker.store.stored_events import history
from tests.cli.conftest import W1, Command, node_of_a_cluster, register, retire, typed
from tests.support.scripts import Hand


def fail(hand: Hand, run_id: str, error: Exception) -> None:
    hand.submit(run_id)
    hand.claim(run_id)
    hand.commit(run_id, steps=0)
    hand.finish(run_id, error=error)


# --- resume ----------------------------------------------------------------------------------------------


def test_runs_are_resumed_by_id_and_a_bad_id_does_not_stop_the_others(
    command: Command, hand: Hand, client: Client
) -> None:
    """Each run has its own line. The exit code shows that some were not resumed."""
    fail(hand, "good", LLMRateLimitError("slow down"))
    hand.submit("unsafe", durable=False)
    hand.claim("unsafe")
    hand.finish("unsafe", error=LLMRateLimitError("slow down"))

    done = command("resume", "nowhere", "unsafe", "good", "--by", "ada")

    assert done.code == 2
    assert done.out == "good: resumed\n"
    assert "nowhere: run.not_found" in done.err
    assert (
        "unsafe: config.error: the run 'unsafe' has no checkpoint, so it cannot be resumed\n  hint: it is not"
        in done.err
    )
    assert "1 run resumed, 2 not resumed" in done.err
    events = client.store.execute(history(client.store.keys, "good"))
    assert [event.payload["by"] for event in events if event.name == "run.resumed"] == ["ada"]
    assert command("resume", "good").out == "good: is already active (queued)\n"
    client.cancel("good")


@pytest.mark.parametrize("named", [("bad", "good"), ("--state", "failed", "--yes")])
def test_a_run_with_an_overwritten_key_does_not_stop_the_others(
    command: Command, hand: Hand, client: Client, named: tuple[str, ...]
) -> None:
    """Its error names the key."""
    fail(hand, "good", LLMRateLimitError("slow down"))
    fail(hand, "bad", LLMRateLimitError("slow down"))
    key = client.store.keys("journal", "bad")
    client.store.redis.delete(key)
    client.store.redis.set(key, "text", ex=60)

    done = command("resume", *named)

    assert (done.code, done.out) == (2, "good: resumed\n")
    assert f"bad: redis.wrong_type: the key {key}" in done.err
    client.cancel("good")


def test_a_run_that_was_cancelled_before_its_start_is_resumed(command: Command, client: Client) -> None:
    """It waits in its queue again."""
    client.submit({"agent_id": "a", "session_id": "s", "input_text": "hi", "run_id": "r1"})
    client.cancel("r1")

    done = command("resume", "r1")
    state = client.record("r1").state
    client.cancel("r1")

    assert (done.code, done.out, state) == (0, "r1: resumed\n", RunState.QUEUED)


def test_a_filter_needs_a_confirmation(command: Command, hand: Hand, client: Client) -> None:
    """Without a terminal, the command requires --yes. It prints the number of the runs."""
    fail(hand, "r1", LLMRateLimitError("slow down"))
    fail(hand, "r2", LLMRateLimitError("slow down"))
    fail(hand, "r3", LLMResponseError("no"))
    arguments = ("resume", "--state", "failed", "--since", "1h", "--code", "llm.rate*")

    rejected = command(*arguments)
    assert (rejected.code, rejected.out) == (1, "")
    assert "2 runs would be resumed" in rejected.err
    assert "r1" in rejected.err
    assert client.record("r1").state is RunState.FAILED

    done = command(*arguments, "--yes", "--json")
    assert (done.code, done.json) == (0, {"resumed": ["r2", "r1"], "failed": []})
    assert client.record("r3").state is RunState.FAILED
    for run_id in ("r2", "r1"):
        client.cancel(run_id)


def test_two_values_for_one_name_are_refused(command: Command, client: Client) -> None:
    """No run has both labels. Before, the last one was taken, and the runs of the test were resumed."""
    labels = {"env": "test"}
    client.submit({"agent_id": "a", "session_id": "s", "input_text": "hi", "run_id": "r1", "labels": labels})
    client.cancel("r1")
    both = ("--label", "env=prod", "--label", "env=test")

    refused = [
        command("resume", "--state", "cancelled", *both, "--yes"),
        command("runs", *both),
        command("run", "a", "hi", *both, "--detach"),
        command("run", "a", "hi", "--budget", "max_steps=1", "--budget", "max_steps=2", "--detach"),
        command("extend", "r1", "max_steps=1", "max_steps=2"),
    ]
    twice = command("runs", "--label", "env=test", "--label", "env=test", "--json")

    assert [done.code for done in refused] == [1] * 5
    assert "Invalid value for --label: 'env' has two values: 'prod' and 'test'" in refused[0].err
    assert client.record("r1").state is RunState.CANCELLED
    assert [run["run_id"] for run in twice.json["items"]] == ["r1"]


@pytest.mark.parametrize(
    ("answer", "code", "state"), [("y\n", 0, "queued"), ("n\n", 1, "failed"), ("", 1, "failed")]
)
def test_a_filter_asks_for_confirmation_on_a_terminal(
    command: Command,
    hand: Hand,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    state: str,
) -> None:
    """Any answer except yes means no."""
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    fail(hand, "r1", LLMRateLimitError("slow down"))
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr("openagents_worker.cli.commands.resuming.is_terminal", lambda: True)

    done = command("resume", "--state", "failed")

    assert "Resume 1 run? [y/N]" in done.err
    assert (done.code, client.record("r1").state) == (code, state)
    client.cancel("r1")


def test_resume_needs_either_ids_or_a_filter(command: Command) -> None:
    """Without any of them it would resume all failed runs."""
    assert command("resume").code == command("resume", "r1", "--state", "failed").code == 1


def test_only_failed_and_cancelled_runs_can_be_selected(command: Command) -> None:
    """Runs in another state cannot be resumed, so the command does not pretend to look for them."""
    refused = command("resume", "--state", "running", "--yes")
    assert refused.code == 1
    assert "'running' is not one of 'failed', 'cancelled'" in refused.err


# --- workers and status ----------------------------------------------------------------------------------


def test_workers_are_listed_with_their_queues_and_agents(command: Command, client: Client) -> None:
    register(client, agents=("clerk", "porter"))

    listed = command("workers")
    as_json = command("workers", "--json")

    header, line = listed.out.splitlines()
    assert header.split()[:6] == ["WORKER", "HOST", "VERSION", "QUEUES", "AGENTS", "RUNS"]
    assert line.split()[:8] == [W1, "box", "9.9", "agents", "clerk,porter", "0/20", "40", "ms"]
    assert [one["incarnation"] for one in as_json.json["items"]] == [W1]
    retire(client)
    assert "no workers" in command("workers").err


def test_status_lists_the_problems(command: Command, client: Client, hand: Hand) -> None:
    """A queue and an agent without a worker, and a blocked loop.

    Runs that have ended do not count, nor does an agent that was taken out of the agents file.
    """
    request = {"agent_id": "clerk", "input_text": "hi"}
    client.submit({**request, "session_id": "s0", "run_id": "r0"}, queue="typo")
    client.cancel("r0")
    assert "waits" not in command("status").out
    client.submit({**request, "session_id": "s1", "run_id": "r1"}, queue="typo")
    client.submit({**request, "agent_id": "porter", "session_id": "s2", "run_id": "r2"}, queue="typo")
    register(client, agents=("clerk", "porter", "removed"))
    register(client, agents=("clerk",))
    client.store.run(scripts.renew(incarnation=W1, lease_ms=60_000, loop_lag_ms=2500))
    client.store.run(scripts.retire(incarnation=hand.incarnation))
    fleet = command("status")
    as_json = command("status", "--json").json
    runs = {line.split()[1]: line for line in command("runs").out.splitlines()[1:]}

    assert runs.keys() == {"cancelled", "queued"}
    assert "no worker serves queue typo" in runs["queued"]
    assert "2 runs wait in queue typo" in fleet.out
    assert "no worker serves queue typo" in fleet.out
    assert "no worker serves the agent porter" in fleet.out
    assert "its event loop was blocked for 2.5 s" in fleet.out
    assert len(as_json["problems"]) == 3
    assert {queue["name"]: queue["waiting"] for queue in as_json["queues"]} == {"agents": 0, "typo": 2}
    assert {agent["id"]: agent["workers"] for agent in as_json["agents"]} == {"clerk": [W1], "porter": []}
    json.dumps(as_json)
    retire(client)
    hand.register()
    client.cancel("r1")
    client.cancel("r2")


def test_status_shows_the_parts_of_a_worker_that_fail(command: Command, client: Client) -> None:
    """Since when, how often, and the code of the last error. One that works again is not a problem."""
    register(client, agents=("clerk",))
    parts = [
        PartProblem("outbox", PartState.FAILING, 120.0, 3, "ConnectionError"),
        PartProblem("rescue", PartState.RECOVERED, 60.0, 0, RedisUnreachable.code),
    ]
    client.store.run(scripts.renew(incarnation=W1, lease_ms=60_000, parts=parts_json(parts)))
    shown, as_json, listed = command("status"), command("status", "--json").json, command("workers", "--json")

    (problem,) = as_json["problems"]
    assert problem.startswith(f"worker {W1}: its part outbox is failing since 20")
    assert problem.endswith(" (last error: ConnectionError); see its log")
    rows = {tuple(line.split()) for line in shown.out.splitlines()}
    assert (W1, "outbox", "failing", "2m", "3", "ConnectionError") in rows
    assert (W1, "rescue", "recovered", "1m", "0", RedisUnreachable.code) in rows
    assert [part["part"] for part in listed.json["items"][0]["parts"]] == ["outbox", "rescue"]

    client.store.run(scripts.renew(incarnation=W1, lease_ms=60_000))
    assert command("status", "--json").json["problems"] == []
    retire(client)


def test_status_shows_the_limits_for_which_runs_wait(command: Command, client: Client) -> None:
    keys, redis = client.store.keys, client.store.redis
    redis.zadd(keys("limits"), {"mock:m": 1})
    redis.zadd(keys("limit_queue", "mock:m"), {"r1": 0, "r2": 1})
    redis.zadd(keys("limit_calls", "mock:m"), {"1:n c r3": 1})
    for key in (keys("limits"), keys("limit_queue", "mock:m"), keys("limit_calls", "mock:m")):
        redis.pexpire(key, 60_000)

    lines = [line.split() for line in command("status").out.splitlines()]

    assert ["LIMIT", "WAITING", "IN", "USE"] in lines
    assert ["mock:m", "2", "1"] in lines
    assert command("status", "--json").json["limits"] == [{"name": "mock:m", "waiting": 2, "in_use": 1}]


def test_status_of_a_deployment_without_workers(command: Command) -> None:
    """It says how to start one."""
    shown = command("status")

    assert shown.code == 0
    assert "no worker is alive: nothing is executed; start one: openagents-worker worker" in shown.out


def test_status_of_a_healthy_deployment(command: Command, client: Client) -> None:
    register(client, agents=("clerk",))

    assert command("status").out.startswith("no problems\n")
    retire(client)


# --- a Redis that refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("runs",), ("sessions",), ("approvals",), ("status",), ("top",)])
def test_a_list_that_redis_refuses_is_one_error_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """A node of a cluster without slots, and a replica that has lost its master, refuse every read."""
    with node_of_a_cluster() as node:
        monkeypatch.setenv("OPENAGENTS_REDIS_URL", node.url)
        done = typed(arguments, monkeypatch, capsys)

        assert (done.code, done.out) == (4, "")
        refused = f"error: redis.unreachable: Redis at {node.url} temporarily refuses commands: "
        assert done.err.startswith(refused), done.err
        assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("runs",), ("runs", "--state", "queued"), ("approvals",), ("status",)])
def test_a_missing_right_is_not_an_unreadable_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    """The error names the right, and not every run as one that cannot be read."""
    with EmbeddedRedis() as server, Hand(server.url) as other:
        other.submit("r1")
        admin = other.store.redis
        admin.zadd(other.store.keys("index", "approvals"), {"r1": 1})
        admin.execute_command("ACL", "SETUSER", "poor", "on", "nopass", "~*", "&*", "+@all", "-hmget")
        monkeypatch.setenv("OPENAGENTS_REDIS_URL", server.url.replace("//", "//poor:x@"))
        done = typed(arguments, monkeypatch, capsys)

    assert (done.code, done.out) == (4, "")
    assert done.err.startswith("error: redis.no_permission: the user 'poor' of Redis at ")
    assert "hmget" in done.err


# --- no Redis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("workers",), ("runs",), ("show", "r1"), ("resume", "r1"), ("resume", "--state", "failed")],
)
def test_without_redis_every_command_prints_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """The exit code is 4. With --json the error is one object."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", "redis://127.0.0.1:1/0")

    done = command(*arguments)
    as_json = command(*arguments, "--json")

    assert (done.code, done.out) == (4, "")
    assert len(done.err.splitlines()) == 1
    assert done.err.startswith("error: redis.unreachable: cannot reach Redis at redis://127.0.0.1:1/0")
    assert (as_json.code, as_json.json["error"]["code"]) == (4, "redis.unreachable")
