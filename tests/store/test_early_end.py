"""The scripts that end a lease early, one answer per test.

Afterwards, everything is as at the end of any lease.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.store.scripts import FalseAlarm, LookResult
from tests.store.test_scripts import HOUR_MS, Bench, woken
from tests.support.waiting import wait_for

HERE = {"host": "boot one", "process": "11 500"}


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


# --- workers of one host ---------------------------------------------------------------------------------


def test_a_worker_learns_the_other_workers_of_its_host(bench: Bench) -> None:
    """With its registration, and with each `look` after another worker has started."""
    bench.do("register", incarnation="w2", host="boot one", process="12 600")
    bench.do("register", incarnation="w3", host="boot two", process="12 600")

    registered = bench.do("register", incarnation="w4", **HERE)
    assert registered.neighbours == {"w2": "12 600", "w4": "11 500"}
    first = bench.do("look", host="boot one")
    assert first.neighbours == registered.neighbours
    assert bench.do("look", host="boot one", joined=first.joined).neighbours is None

    bench.do("register", incarnation="w5", host="boot one", process="13 700")
    then = bench.do("look", host="boot one", joined=first.joined)

    assert then.neighbours == {"w2": "12 600", "w4": "11 500", "w5": "13 700"}


def test_a_worker_without_a_host_is_not_checked_by_other_workers(bench: Bench) -> None:
    """For example a worker of an earlier version: only its lease counts."""
    bench.do("register", incarnation="w2", **HERE)

    assert bench.do("look").neighbours is None
    assert bench.do("look", host="boot one").neighbours == {"w2": "11 500"}
    assert bench.do("end_lease", incarnation="w1", host="", process="") == "OVER"


def test_a_worker_without_a_lease_is_removed_from_its_host(bench: Bench) -> None:
    """It has retired, was reclaimed, or its lease is over: there is no lease to end."""
    for incarnation in ("retired", "reclaimed", "over", "w2"):
        bench.do("register", incarnation=incarnation, **HERE)
    bench.do("retire", incarnation="retired", host="boot one")
    bench.redis.zrem(bench.store.keys("workers"), "reclaimed")  # by a worker that does not know hosts
    bench.lab.end_lease("over")

    assert bench.do("look", host="boot one").neighbours == {"w2": "11 500"}
    assert set(bench.redis.hkeys(bench.store.keys("host", "boot one"))) == {"", "over", "w2"}


def test_the_lease_of_a_dead_process_ends_immediately(bench: Bench) -> None:
    """OK: `reclaim` takes its runs, and they count as recovered from a dead worker."""
    bench.do("register", incarnation="dead", lease_ms=HOUR_MS, **HERE)
    bench.do("submit")
    bench.claim("r1", "dead")

    assert bench.do("end_lease", incarnation="dead", **HERE) == "OK"

    assert bench.do("renew", incarnation="dead").lost
    reclaimed = bench.do("reclaim")
    assert (reclaimed.incarnation, woken(reclaimed.wakes)) == ("dead", ["r1"])
    assert (bench.field("recoveries"), bench.field("stuck")) == ("1", "1")


def test_several_workers_of_a_host_end_a_lease_only_once(bench: Bench) -> None:
    """OVER: each of them has noticed the death."""
    bench.do("register", incarnation="dead", **HERE)

    assert [bench.do("end_lease", incarnation="dead", **HERE) for _ in range(3)] == ["OK", "OVER", "OVER"]
    deadline = bench.score("workers", "dead")
    bench.do("end_lease", incarnation="dead", **HERE)
    assert bench.score("workers", "dead") == deadline


@pytest.mark.parametrize(
    "other", [{"host": "boot two"}, {"process": "11 501"}, {"incarnation": "w1"}, {"incarnation": "nobody"}]
)
def test_only_the_checked_process_of_this_host_loses_its_lease(bench: Bench, other: dict[str, str]) -> None:
    """OVER: another host, another process, another incarnation."""
    bench.do("register", incarnation="w2", **HERE)

    assert bench.do("end_lease", **{"incarnation": "w2", **HERE, **other}) == "OVER"

    assert not bench.do("renew", incarnation="w2").lost
    assert not bench.do("renew").lost


# --- connections -----------------------------------------------------------------------------------------

SILENCE_MS = 2_000
WITHIN_MS = 10_000


class Connections:
    """The heartbeat connections of some incarnations, and the checks of them."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.server = str(bench.redis.info("server")["run_id"])
        self._open: dict[str, Any] = {}

    def connect(self, incarnation: str = "w2") -> None:
        pubsub = self._open[incarnation] = self._bench.redis.pubsub()
        pubsub.subscribe(self._bench.store.keys.alive(incarnation))
        pubsub.get_message(timeout=60)

    def close(self, incarnation: str = "w2") -> None:
        self._open.pop(incarnation).close()
        alive = self._bench.store.keys.alive(incarnation)
        wait_for(lambda: self._bench.redis.pubsub_numsub(alive)[0][1] == 0, "the server has seen it")

    def close_all(self) -> None:
        for pubsub in self._open.values():
            pubsub.close()

    def begin(self, incarnation: str = "w2", **registered: Any) -> None:
        """A worker that has registered, connected and renewed: from now on, the loss of its connection is
        noticed."""
        self._bench.do("register", incarnation=incarnation, lease_ms=HOUR_MS, **registered)
        self.connect(incarnation)
        self.renew(incarnation)

    def renew(self, incarnation: str = "w2", server: str = "") -> Any:
        server = server or self.server
        return self._bench.do(
            "renew",
            incarnation=incarnation,
            lease_ms=HOUR_MS,
            server=server,
            renewed_within_ms=WITHIN_MS,
        )

    def look(self, server: str = "") -> LookResult:
        """Check as if the last check were a second ago."""
        self._bench.redis.delete(self._bench.store.keys("looked"))
        looked: LookResult = self._bench.do("look", server=server or self.server, silence_ms=SILENCE_MS)
        return looked

    def give_up(self, incarnation: str = "w2") -> None:
        """Its connection has been closed for long enough, and a worker checks."""
        self.close(incarnation)
        assert self.look().given_up == ()
        self._bench.lab.let_pass(max(SILENCE_MS, WITHIN_MS))
        assert self.look().given_up == (incarnation,)


@pytest.fixture
def connections(bench: Bench) -> Generator[Connections]:
    connections = Connections(bench)
    yield connections
    connections.close_all()


def test_the_lease_of_a_worker_without_a_connection_is_ended(bench: Bench, connections: Connections) -> None:
    """Afterwards, everything is as at the end of any lease, and the recovery counts."""
    connections.begin()
    bench.do("submit")
    bench.claim("r1", "w2")

    connections.give_up()

    assert bench.do("renew", incarnation="w2").lost
    assert woken(bench.do("reclaim").wakes) == ["r1"]
    assert (bench.field("recoveries"), bench.field("stuck")) == ("1", "1")


def test_a_worker_with_a_connection_keeps_its_lease(bench: Bench, connections: Connections) -> None:
    """It may be stopped, or its event loop may be blocked: only the deadline of its lease counts."""
    connections.begin()

    for _ in range(3):
        bench.lab.let_pass(WITHIN_MS)
        assert connections.look() == LookResult()


def test_a_lease_is_ended_only_after_the_silence_and_after_a_missed_renewal(
    bench: Bench, connections: Connections
) -> None:
    """Both times must be over. The answer says when that will be, so that the next check is in time."""
    connections.begin()
    bench.lab.let_pass(WITHIN_MS - SILENCE_MS // 2)  # a second before it should have renewed
    connections.close()
    assert connections.look().next_ms is None  # two seconds of silence: not earlier than usual

    bench.lab.let_pass(SILENCE_MS - 500)
    looked = connections.look()
    assert looked.given_up == ()
    assert looked.next_ms is not None
    assert 0 < looked.next_ms <= 500

    connections.connect()
    connections.renew()
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS - 1_000)  # of silence, but its renewal is only due then
    assert connections.look().given_up == ()


def test_a_new_connection_ends_the_silence(bench: Bench, connections: Connections) -> None:
    """The next silence is counted from its own start."""
    connections.begin()
    connections.close()
    connections.look()
    connections.connect()
    bench.lab.let_pass(WITHIN_MS)
    connections.look()
    connections.close()

    assert connections.look().given_up == ()


def test_a_renewal_ends_the_silence(bench: Bench, connections: Connections) -> None:
    """Whatever happened to its connection: the worker is alive."""
    connections.begin()
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS)
    connections.renew()

    assert connections.look().given_up == ()
    assert bench.redis.zcard(bench.store.keys("silent")) == 0


def test_a_worker_that_has_never_subscribed_keeps_its_lease(bench: Bench, connections: Connections) -> None:
    """A worker of an earlier version, one that may not subscribe, one that has just registered."""
    bench.do("register", incarnation="w2", lease_ms=HOUR_MS)
    connections.renew()  # without a subscribed connection
    connections.look()
    bench.lab.let_pass(WITHIN_MS)

    assert connections.look().given_up == ()


def test_a_server_that_has_never_seen_a_connection_does_not_judge_it(
    bench: Bench, connections: Connections
) -> None:
    """After a failover or a restart, only the lease counts until the worker has renewed on the new server."""
    connections.begin()
    connections.renew(server="another")
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS)

    assert connections.look().given_up == ()


def test_a_worker_with_a_run_that_is_not_durable_keeps_its_lease(
    bench: Bench, connections: Connections
) -> None:
    """A mistake would end this run, and nothing could restore it."""
    connections.begin()
    bench.do("submit", durable=False)
    fence = bench.claim("r1", "w2")
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS)
    assert connections.look().given_up == ()

    bench.do("commit", fence=fence)
    bench.do("finish", fence=fence)

    assert connections.look().given_up == ("w2",)


def test_a_cell_is_checked_once_a_second(bench: Bench, connections: Connections) -> None:
    """By any of the workers. The others only get the workers of their host."""
    connections.begin()
    bench.do("register", incarnation="w3", **HERE)
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS)
    bench.redis.set(bench.store.keys("looked"), "1", px=60_000)

    looked = bench.do("look", server=connections.server, silence_ms=SILENCE_MS, host="boot one")

    assert looked == LookResult(joined="1", neighbours={"w3": "11 500"})


def test_without_the_right_to_pubsub_no_lease_is_ended(bench: Bench, connections: Connections) -> None:
    """`look` returns, and a renewal does not mark any worker as watched."""
    connections.begin()
    connections.close()
    connections.look()
    bench.lab.let_pass(WITHIN_MS)
    bench.redis.execute_command("ACL", "SETUSER", "default", "-pubsub")
    try:
        assert connections.look().given_up == ()
        assert not connections.renew().lost
        assert bench.redis.hgetall(bench.store.keys("watched")) == {}
    finally:
        bench.redis.execute_command("ACL", "SETUSER", "default", "+@all")


@pytest.mark.parametrize("end", ["retire", "reclaim", "register"])
def test_the_information_about_a_connection_is_deleted_with_the_lease(
    bench: Bench, connections: Connections, end: str
) -> None:
    """No key of a dead worker is left."""
    connections.begin()
    connections.close()
    connections.look()
    if end == "reclaim":
        bench.lab.end_lease("w2")

    bench.do(end, **({} if end == "reclaim" else {"incarnation": "w2"}))

    assert bench.redis.hgetall(bench.store.keys("watched")) == {}
    assert bench.redis.zcard(bench.store.keys("silent")) == 0


def test_entries_that_an_earlier_version_leaves_are_deleted(bench: Bench, connections: Connections) -> None:
    """It does not know about connections, so it does not delete their entries when it reclaims runs."""
    bench.redis.hset(bench.store.keys("watched"), mapping={f"old{n}": "server 1" for n in range(3)})
    connections.begin()

    connections.look()

    assert list(bench.redis.hgetall(bench.store.keys("watched"))) == ["w2"]


# --- false alarms ----------------------------------------------------------------------------------------


def test_a_worker_that_was_alive_reverses_the_recovery_of_its_runs(
    bench: Bench, connections: Connections
) -> None:
    """FALSE_ALARM: its heartbeat is answered with LOST, and it reports that it is alive.

    A repeated report has no effect.
    """
    connections.begin()
    bench.do("submit")
    bench.claim("r1", "w2")
    connections.give_up()
    bench.do("reclaim")

    said = [bench.do("alarm", incarnation="w2") for _ in range(2)]
    bench.do("register", incarnation="w3", previous="w2")

    assert said == [FalseAlarm(runs=1, seen_by="connection", off=False), None]
    assert (bench.field("recoveries"), bench.field("stuck")) == ("0", "0")
    assert bench.events()[-1] == "worker.false_alarm"


def test_recoveries_after_the_report_do_not_count(bench: Bench, connections: Connections) -> None:
    """The worker may report before its runs are reclaimed."""
    connections.begin()
    bench.do("submit")
    bench.claim("r1", "w2")
    connections.give_up()
    bench.do("alarm", incarnation="w2")
    bench.do("register", incarnation="w3", previous="w2")

    assert woken(bench.do("reclaim").wakes) == ["r1"]

    assert (bench.field("recoveries"), bench.field("stuck")) == ("0", "0")


def test_a_false_alarm_does_not_remove_other_deaths(bench: Bench, connections: Connections) -> None:
    """A step in the meantime has removed all suspicion, and a real death has added it again."""
    connections.begin()
    bench.do("submit")
    bench.claim("r1", "w2")
    connections.give_up()
    bench.do("reclaim")
    fence = bench.claim()
    bench.do("commit", fence=fence)
    bench.do("suspend", fence=fence, kind="handover")
    bench.claim()
    bench.lab.end_lease("w1")
    bench.do("reclaim")

    bench.do("alarm", incarnation="w2")
    bench.do("register", incarnation="w3", previous="w2")

    assert (bench.field("recoveries"), bench.field("stuck")) == ("1", "1")


def test_a_run_that_has_ended_gets_no_event(bench: Bench, connections: Connections) -> None:
    """Its final event stays its last event."""
    connections.begin()
    bench.do("submit")
    bench.claim("r1", "w2")
    connections.give_up()
    bench.do("reclaim")
    bench.do("cancel")

    assert bench.do("alarm", incarnation="w2").runs == 1

    assert bench.events()[-1] == "session.run.completed"


def test_a_lease_that_was_not_ended_early_is_not_a_false_alarm(bench: Bench) -> None:
    """None: the worker could not renew in time."""
    bench.lab.end_lease("w1")

    assert bench.do("alarm") is None


@pytest.mark.parametrize("seen_by", ["connection", "process"])
def test_the_third_false_alarm_within_an_hour_switches_the_check_off(
    bench: Bench, connections: Connections, seen_by: str
) -> None:
    """For an hour, this check ends no leases. The other check continues."""

    def ends_wrongly(incarnation: str) -> bool:
        if seen_by == "process":
            bench.do("register", incarnation=incarnation, **HERE)
            return bool(bench.do("end_lease", incarnation=incarnation, **HERE) == "OK")
        connections.begin(incarnation)
        connections.close(incarnation)
        connections.look()
        bench.lab.let_pass(WITHIN_MS)
        return connections.look().given_up == (incarnation,)

    off = []
    for number in range(3):
        assert ends_wrongly(f"x{number}")
        off.append(bench.do("alarm", incarnation=f"x{number}").off)

    assert off == [False, False, True]
    assert not ends_wrongly("x4")
    other = "process" if seen_by == "connection" else "connection"
    assert bench.redis.keys(f"{bench.store.keys('looks_off', '')}*") == [
        bench.store.keys("looks_off", seen_by)
    ]
    assert not bench.redis.exists(bench.store.keys("looks_off", other))


def test_old_false_alarms_do_not_count(bench: Bench) -> None:
    """Three within an hour show that something is wrong; three in a year do not."""
    for number in range(4):
        bench.do("register", incarnation=f"x{number}", **HERE)
        bench.do("end_lease", incarnation=f"x{number}", **HERE)
        assert not bench.do("alarm", incarnation=f"x{number}").off
        bench.lab.let_pass(HOUR_MS // 2 + 1_000)
