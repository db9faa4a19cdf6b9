"""Connection checks: dead workers of other hosts are detected by their connections; live ones keep leases."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis.client import PubSub

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.local_processes import ProcessIdentity
from tests.support.lossy_proxy import Proxy
from tests.support.scripts import Hand
from tests.support.waiting import wait_for
from tests.worker.conftest import HEARTBEAT_MS, StartHeartbeat
from tests.worker.run_host import RecordingRunHost

LONG_MS = 600_000


def registered(heartbeat: Heartbeat) -> str:
    assert heartbeat.wait_registered(5)
    return heartbeat.lease.incarnation


def listeners(store: Store, incarnation: str) -> int:
    return int(store.ask(lambda r: r.pubsub_numsub(store.keys.alive(incarnation)))[0][1])


def deadline(store: Store, incarnation: str) -> float:
    return float(store.ask(lambda r: r.zscore(store.keys("workers"), incarnation)) or 0)


def watched(store: Store, incarnation: str) -> str | None:
    found: str | None = store.ask(lambda r: r.hget(store.keys("watched"), incarnation))
    return found


class Other:
    """A worker of another host that is driven by hand, with its own connection."""

    def __init__(self, hand: Hand, incarnation: str) -> None:
        self._hand = hand
        self.incarnation = incarnation
        self._pubsub: PubSub = hand.store.redis.pubsub()
        self._pubsub.subscribe(hand.store.keys.alive(incarnation))
        wait_for(lambda: listeners(hand.store, incarnation) == 1, "it is subscribed")
        hand.store.run(scripts.register(incarnation=incarnation, lease_ms=LONG_MS, agents=[]))

    def renew(self) -> scripts.Renewal:
        """Renew; without another renewal within a heartbeat it counts as silent."""
        server = self._hand.store.redis.info("server")["run_id"]
        return self._hand.store.run(
            scripts.renew(
                incarnation=self.incarnation,
                lease_ms=LONG_MS,
                server=str(server),
                renewed_within_ms=HEARTBEAT_MS,
            )
        )

    def die(self) -> None:
        self._pubsub.close()


@pytest.fixture
def other(hand: Hand) -> Generator[Other]:
    other = Other(hand, "other:1")
    yield other
    other.die()
    hand.store.run(scripts.retire(incarnation=other.incarnation))


def test_a_worker_of_another_host_that_dies_is_given_up(
    start_heartbeat: StartHeartbeat, hand: Hand, other: Other, given_up: list[str]
) -> None:
    """Long before its lease of ten minutes expires; the worker that detects it wakes its rescue loop."""
    registered(start_heartbeat())
    other.renew()
    wait_for(lambda: hand.store.redis.exists(hand.store.keys("looked")), "a check is made")
    assert deadline(hand.store, other.incarnation) > deadline(hand.store, hand.incarnation)

    other.die()

    wait_for(lambda: given_up, "the worker was given up")
    assert other.renew().lost


def test_a_worker_without_other_workers_makes_no_checks(start_heartbeat: StartHeartbeat, hand: Hand) -> None:
    """The next renewal after the registration of another worker starts the checks."""
    redis, looked = hand.store.redis, hand.store.keys("looked")
    hand.store.run(scripts.retire(incarnation=hand.incarnation))
    incarnation = registered(start_heartbeat(check_every_s=HEARTBEAT_MS / 2_000))

    def renewed() -> None:
        before = deadline(hand.store, incarnation)
        wait_for(lambda: deadline(hand.store, incarnation) > before, "it has renewed its lease")

    renewed()
    renewed()  # by now the reply to the first renewal was handled
    redis.delete(looked)

    renewed()
    renewed()
    alone = redis.exists(looked)
    other = Other(hand, "other:1")

    wait_for(lambda: redis.exists(looked), "it checks the other worker")
    assert not alone
    other.die()


def test_a_heartbeat_is_checked_from_its_first_renewal(start_heartbeat: StartHeartbeat, hand: Hand) -> None:
    """Its connection subscribes before it registers, and Redis stores which server has the connection."""
    incarnation = registered(start_heartbeat())

    assert listeners(hand.store, incarnation) == 1
    server = hand.store.redis.info("server")["run_id"]
    wait_for(lambda: str(watched(hand.store, incarnation)).startswith(f"{server} "), "it is checked")


def test_a_worker_that_lost_its_connection_reconnects_and_renews_at_once(
    start_heartbeat: StartHeartbeat, hand: Hand
) -> None:
    """`CLIENT KILL TYPE pubsub`: it does not wait for its next heartbeat, which is minutes away."""
    heartbeat = start_heartbeat(lease_ms=LONG_MS, heartbeat_ms=LONG_MS // 4)
    incarnation = registered(heartbeat)

    for _ in range(5):
        before = deadline(hand.store, incarnation)
        hand.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        wait_for(lambda before=before: deadline(hand.store, incarnation) > before, "it has renewed")  # type: ignore[misc]
        assert listeners(hand.store, incarnation) == 1

    assert heartbeat.lease.incarnation == incarnation
    assert watched(hand.store, incarnation)


@pytest.mark.long
@pytest.mark.allow_blocking(reason="the test stalls the network")
def test_a_slow_network_that_cuts_connections_is_not_a_death(
    start_heartbeat: StartHeartbeat, hand: Hand, cell: Cell, given_up: list[str]
) -> None:
    """Each reply takes a quarter of a second, and the connection is closed after each renewal."""
    registered(start_heartbeat())  # makes checks over a direct connection
    with Proxy(cell.url) as proxy:
        proxy.lose_answer_to = lambda _: bool(time.sleep(0.25))
        heartbeat = start_heartbeat(Cell(proxy.url), lease_ms=20_000, heartbeat_ms=1_000)
        incarnation = registered(heartbeat)

        for _ in range(4):
            before = deadline(hand.store, incarnation)
            hand.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            wait_for(lambda before=before: deadline(hand.store, incarnation) > before, "it has renewed")  # type: ignore[misc]

        assert heartbeat.lease.incarnation == incarnation
        heartbeat.stop()
    assert given_up == []
    assert hand.store.redis.keys("oa:gone:*") == []


@pytest.mark.allow_blocking(reason="the test stalls the network")
def test_a_network_that_stalls_for_less_than_the_lease_is_not_a_death(
    start_heartbeat: StartHeartbeat, hand: Hand, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    """No data arrives until the worker has closed its connection; then it reconnects."""
    registered(start_heartbeat())
    passes = threading.Event()
    with Proxy(cell.url) as proxy:
        passes.set()
        proxy.lose_answer_to = lambda _: not passes.wait()
        heartbeat = start_heartbeat(Cell(proxy.url), lease_ms=20_000, heartbeat_ms=1_000)
        incarnation = registered(heartbeat)
        wait_for(lambda: watched(hand.store, incarnation), "it is checked")

        passes.clear()
        wait_for(lambda: "redis.away" in caplog.text, "it has reported a timeout")
        before = deadline(hand.store, incarnation)
        passes.set()
        wait_for(lambda: deadline(hand.store, incarnation) > before, "it has renewed")

        assert heartbeat.lease.incarnation == incarnation
        heartbeat.stop()
    assert hand.store.redis.keys("oa:gone:*") == []


def test_a_message_in_its_channel_does_no_harm(start_heartbeat: StartHeartbeat, hand: Hand) -> None:
    """No message is expected there; after one, the worker reconnects."""
    heartbeat = start_heartbeat(lease_ms=LONG_MS, heartbeat_ms=LONG_MS // 4)
    incarnation = registered(heartbeat)
    before = deadline(hand.store, incarnation)

    def has_renewed_for_it() -> bool:
        hand.store.redis.publish(hand.store.keys.alive(incarnation), "hello")
        return deadline(hand.store, incarnation) > before

    wait_for(has_renewed_for_it, "it has renewed")
    wait_for(lambda: listeners(hand.store, incarnation) == 1, "it is subscribed")
    assert heartbeat.lease.incarnation == incarnation


def test_a_worker_that_was_given_up_but_lives_reports_it(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: RecordingRunHost, caplog: pytest.LogCaptureFixture
) -> None:
    """It loses the lease and registers a new incarnation; the death is not counted for its runs."""
    heartbeat = start_heartbeat(process=ProcessIdentity("here", "1 1"))
    first = registered(heartbeat)
    run_host.known_runs.add("r1")
    own, hand.incarnation = hand.incarnation, first
    hand.submit("r1")
    hand.claim("r1")
    hand.incarnation = own

    ended = scripts.end_lease(incarnation=first, host="here", process="1 1")
    assert hand.store.run(ended) == "OK"

    wait_for(lambda: heartbeat.lease.incarnation != first, "a new incarnation registered")
    wait_for(lambda: "worker.false_alarm" in caplog.text, "it has reported the false alarm")
    hand.store.run(scripts.reclaim(limit=100, max_recoveries=5, blameless=False))
    assert hand.store.redis.hget(hand.store.keys("run", "r1"), "recoveries") == "0"


def test_without_resp3_a_worker_still_renews_its_lease(
    start_heartbeat: StartHeartbeat, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection cannot be checked: only its lease counts, and one log line reports it."""
    (tmp_path / "more.conf").write_text('rename-command HELLO ""\n')
    with (
        EmbeddedRedis(extra={"include": str(tmp_path / "more.conf")}) as redis,
        resp2_store(redis.url) as store,
    ):
        heartbeat = start_heartbeat(Cell(redis.url))
        incarnation = registered(heartbeat)
        first = deadline(store, incarnation)
        wait_for(lambda: deadline(store, incarnation) != first, "the lease was renewed")
        store.redis.execute_command("CLIENT", "KILL", "TYPE", "normal")
        second = deadline(store, incarnation)
        wait_for(lambda: deadline(store, incarnation) != second, "the lease was renewed")

        assert watched(store, incarnation) is None
        heartbeat.stop()
    assert caplog.text.count("HELLO 3 is refused") == 1


def test_a_user_that_may_not_subscribe_still_renews_its_lease(
    start_heartbeat: StartHeartbeat, caplog: pytest.LogCaptureFixture
) -> None:
    """As above; later replies still belong to their commands."""
    with EmbeddedRedis() as redis, resp2_store(redis.url) as store:
        store.redis.execute_command("ACL", "SETUSER", "default", "resetchannels", "&oa:notices:*")
        heartbeat = start_heartbeat(Cell(redis.url))
        incarnation = registered(heartbeat)
        first = deadline(store, incarnation)
        wait_for(lambda: deadline(store, incarnation) != first, "the lease was renewed")

        assert watched(store, incarnation) is None
        assert heartbeat.lease.incarnation == incarnation
        heartbeat.stop()
    assert caplog.text.count("SUBSCRIBE is refused") == 1


@contextmanager
def resp2_store(url: str) -> Generator[Store]:
    store = Store(Cell(f"{url}?protocol=2"))
    yield store
    store.close()
