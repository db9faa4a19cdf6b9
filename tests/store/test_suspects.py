"""Which run has killed its process: how the end of a lease creates, halves and removes suspicion."""

from __future__ import annotations

import itertools
import json
from collections.abc import Generator, Sequence

import pytest

from tests.properties.lab import TICK_MS
from tests.store.test_scripts import Bench
from tests.support.stored_events import shown

HEARTBEAT_MS = 2_000


class Deaths(Bench):
    """Workers whose lifetime the test controls."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._numbers = itertools.count(1)

    def submitted(self, *run_ids: str) -> None:
        for run_id in run_ids:
            self.do("submit", run_id=run_id, session_id=f"s-{run_id}")

    def worker(self, *run_ids: str, commits: Sequence[str] = ()) -> str:
        """A new worker that has claimed these runs. The runs in `commits` have a record since then."""
        incarnation = f"x{next(self._numbers)}"
        self.do("register", incarnation=incarnation)
        for run_id in run_ids:
            fence = self.claim(run_id, incarnation)
            if run_id in commits:
                position = self.redis.llen(self.store.keys("journal", run_id))
                record = [json.dumps({"call": f"0.{position}"})]
                self.do("commit", run_id=run_id, fence=fence, position=position, records=record)
        return incarnation

    def lose(self, *incarnations: str, heartbeat_ms: int = 0, max_recoveries: int = 5) -> None:
        """The leases of these workers end, and their runs are reclaimed."""
        for incarnation in incarnations:
            self.lab.end_lease(incarnation)
        while self.do("reclaim", heartbeat_ms=heartbeat_ms, max_recoveries=max_recoveries).incarnation:
            pass

    def dies(self, *run_ids: str, max_recoveries: int = 5, commits: Sequence[str] = ()) -> str:
        """A process with these runs dies."""
        incarnation = self.worker(*run_ids, commits=commits)
        self.lose(incarnation, max_recoveries=max_recoveries)
        return incarnation

    def group(self, run_id: str) -> str:
        held = self.field("suspicion", run_id)
        return str(json.loads(held)["group"]) if held else ""

    def stuck(self, run_id: str = "r1") -> int:
        return int(self.field("stuck", run_id) or 0)

    def failed_with(self, run_id: str) -> str:
        result = self.field("result", run_id)
        return str(json.loads(result)["error_details"]["code"]) if result else ""


@pytest.fixture
def deaths(redis_url: str) -> Generator[Deaths]:
    with Deaths(redis_url) as bench:
        yield bench


RUNS = [f"r{number}" for number in range(1, 9)]

# --- groups ----------------------------------------------------------------------------------------------


def test_a_death_makes_two_groups_of_the_runs_without_a_record(deaths: Deaths) -> None:
    """A run with a record since its claim did not kill the process with its next call."""
    deaths.submitted(*RUNS)

    dead = deaths.dies(*RUNS, commits=RUNS[:2])

    assert [deaths.group(run_id) for run_id in RUNS[:2]] == ["", ""]
    groups = [deaths.group(run_id) for run_id in RUNS[2:]]
    assert sorted(set(groups)) == [f"{dead}:n0", f"{dead}:n1"]
    assert groups.count(f"{dead}:n0") == 3


def test_a_group_is_halved_separately_from_new_suspects(deaths: Deaths) -> None:
    """The new suspects may include another run that kills, so the two groups never share a process again."""
    deaths.submitted(*RUNS)
    first = deaths.dies(*RUNS[:4])
    half = [run_id for run_id in RUNS[:4] if deaths.group(run_id) == f"{first}:n0"]

    second = deaths.dies(*half, *RUNS[4:])

    assert sorted(deaths.group(run_id) for run_id in half) == [f"{second}:s0", f"{second}:s1"]
    assert {deaths.group(run_id) for run_id in RUNS[4:]} == {f"{second}:n0", f"{second}:n1"}
    assert sum(deaths.group(run_id) == f"{first}:n1" for run_id in RUNS[:4]) == 2, (
        "the others are as they were"
    )


def test_a_group_is_halved_whatever_number_of_runs_a_call_takes(deaths: Deaths) -> None:
    """A worker with many runs is reclaimed in several calls."""
    deaths.submitted(*RUNS)
    dead = deaths.worker(*RUNS)
    deaths.lab.end_lease(dead)

    while deaths.do("reclaim", limit=3).incarnation:
        pass

    groups = [deaths.group(run_id) for run_id in RUNS]
    assert abs(groups.count(f"{dead}:n0") - groups.count(f"{dead}:n1")) <= 2
    assert {deaths.stuck(run_id) for run_id in RUNS} == {0}, "none of them was alone"


def test_runs_of_no_group_are_claimed_beside_suspects(deaths: Deaths) -> None:
    """Only suspects of another group have to wait for a suspect."""
    deaths.submitted(*RUNS)
    deaths.dies("r1", "r2")

    worker = deaths.worker("r1", "r3", "r4")

    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "SUSPECT_BUSY"
    assert deaths.do("claim", run_id="r5", incarnation=worker).answer == "CLAIMED"
    assert deaths.do("claim", run_id="r2", incarnation=deaths.worker()).answer == "NOT_DUE"


@pytest.mark.parametrize("leaves", ["commit", "finish", "suspend", "release", "cancel"])
def test_after_a_suspect_leaves_its_worker_another_group_may_be_claimed(deaths: Deaths, leaves: str) -> None:
    """In whatever way it leaves."""
    deaths.submitted("r1", "r2")
    deaths.dies("r1", "r2")
    worker = deaths.worker()
    fence = deaths.claim("r1", worker)

    match leaves:
        case "commit" | "finish" | "suspend":
            deaths.do(leaves, fence=fence)
        case "release":
            deaths.do("release", fence=fence, incarnation=worker)
        case _:
            deaths.do("cancel", force=True)

    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "CLAIMED"


# --- poisoned runs ---------------------------------------------------------------------------------------


def test_only_a_run_that_was_alone_in_its_group_is_poisoned(deaths: Deaths) -> None:
    """Two runs that die together are not poisoned, however often; a run that dies alone is."""
    deaths.submitted("r1", "r2")
    deaths.dies("r1", "r2", max_recoveries=1)
    assert (deaths.stuck("r1"), deaths.stuck("r2")) == (0, 0)

    deaths.dies("r1", max_recoveries=1)

    assert deaths.failed_with("r1") == "run.poisoned"
    assert deaths.field("state", "r2") == "queued"
    assert '"recoveries":2' in str(deaths.redis.xrange(deaths.store.keys("events", "r1")))


def test_a_single_run_is_poisoned_after_as_many_deaths_as_before(deaths: Deaths) -> None:
    """It was the only run each time: six deaths with the default of five recoveries."""
    deaths.submitted("r1")
    states = []
    for _ in range(6):
        deaths.dies("r1")
        states.append(deaths.field("state"))

    assert states == ["queued"] * 5 + ["failed"]


def _only_suspect_too_often(deaths: Deaths) -> None:
    """`r1` never has a record, and `r2`, which has killed the processes, always has one."""
    deaths.submitted("r1", "r2")
    for _ in range(2):
        deaths.dies("r1", "r2", commits=["r2"], max_recoveries=1)
    assert (deaths.field("state", "r1"), deaths.stuck("r1")) == ("queued", 1)


def test_a_run_that_was_the_only_suspect_in_company_is_executed_alone(deaths: Deaths) -> None:
    """Only then is a death of its process certain to be its own."""
    _only_suspect_too_often(deaths)
    deaths.submitted("r3", "r4")
    worker = deaths.worker()

    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "SUSPECT_BUSY", "it is kept free"
    deaths.claim("r1", worker)
    assert deaths.do("claim", run_id="r3", incarnation=worker).answer == "SUSPECT_BUSY"
    assert deaths.do("claim", run_id="r4", incarnation=deaths.worker()).answer == "CLAIMED"

    deaths.lose(worker, max_recoveries=1)
    assert deaths.failed_with("r1") == "run.poisoned"
    events = shown(deaths.redis.xrange(deaths.store.keys("events", "r1")))
    told = [event["payload"].get("alone") for event in events if event["name"] == "run.recovered"]
    assert told == [None, True, None], "before it is executed alone, watchers are told so"


def test_the_process_takes_other_runs_when_the_suspect_has_a_record(deaths: Deaths) -> None:
    """It is not a suspect any more."""
    _only_suspect_too_often(deaths)
    deaths.submitted("r3")

    worker = deaths.worker("r1", commits=["r1"])

    assert deaths.do("claim", run_id="r3", incarnation=worker).answer == "CLAIMED"
    assert not deaths.redis.exists(deaths.store.keys("alone"))


def test_no_process_is_kept_free_for_a_run_of_another_queue(deaths: Deaths) -> None:
    """The process may not consume that queue."""
    _only_suspect_too_often(deaths)
    deaths.do("submit", run_id="r3", session_id="s3", queue="other")

    assert deaths.do("claim", run_id="r3", incarnation=deaths.worker()).answer == "CLAIMED"


@pytest.mark.parametrize("how", ["cancel", "forget"])
def test_no_process_is_kept_free_for_a_run_that_is_over(deaths: Deaths, how: str) -> None:
    """Its entry is removed by the claim that finds it."""
    _only_suspect_too_often(deaths)
    deaths.do("cancel", run_id="r1") if how == "cancel" else deaths.lab.forget("r1")

    assert deaths.do("claim", run_id="r2", incarnation=deaths.worker()).answer == "CLAIMED"
    assert not deaths.redis.exists(deaths.store.keys("alone"))


def test_a_run_that_is_never_alone_is_poisoned_after_three_more_deaths(deaths: Deaths) -> None:
    """Every process is busy, and nothing replaces a dead one: a run that kills ends all the same."""
    _only_suspect_too_often(deaths)
    answers = []
    while deaths.field("state") != "failed":
        deaths.submitted(company := f"c{len(answers)}")
        kept_free = deaths.do("claim", run_id=company, incarnation=deaths.worker())
        deaths.lab.let_pass(2 * TICK_MS)
        deaths.do("wake")
        worker = deaths.worker(company)
        answers.append((kept_free.answer, deaths.do("claim", incarnation=worker).answer))
        deaths.lose(worker, max_recoveries=1)

    assert answers == [("SUSPECT_BUSY", "CLAIMED")] * 3


def test_a_record_removes_all_suspicion(deaths: Deaths) -> None:
    """The process has survived the call of the run."""
    deaths.submitted("r1")
    for _ in range(4):
        deaths.dies("r1")
    assert deaths.stuck() == 4

    deaths.dies("r1", commits=["r1"])

    assert (deaths.stuck(), deaths.group("r1")) == (0, "")
    assert deaths.field("recoveries") == "5"


def test_a_new_life_begins_without_suspicion(deaths: Deaths) -> None:
    """The cause may have been fixed before a poisoned run is resumed."""
    deaths.submitted("r1")
    deaths.dies("r1", commits=["r1"])
    deaths.dies("r1", max_recoveries=0)
    assert deaths.failed_with("r1") == "run.poisoned"

    deaths.do("resume", session_id="s-r1")

    assert (deaths.stuck(), deaths.group("r1")) == (0, "")
    assert deaths.do("claim").answer == "CLAIMED"


# --- leases that ended without a death -------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before its runs are reclaimed", "after"])
def test_a_lost_lease_of_a_live_process_makes_no_suspect(deaths: Deaths, when: str) -> None:
    """The process registers again; the suspicion that was added in the meantime is removed."""
    deaths.submitted("r1", "r2")
    lost = deaths.worker("r1", "r2")
    if when == "after":
        deaths.lose(lost)
        assert deaths.group("r1") != ""
        worker = deaths.worker("r1")
        assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "SUSPECT_BUSY"

    deaths.do("register", incarnation="again", previous=lost)
    deaths.lose(lost) if when != "after" else deaths.lab.let_pass(2_000)

    assert [deaths.group(run_id) for run_id in ("r1", "r2")] == ["", ""]
    if when == "after":
        assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "CLAIMED"


def test_after_three_lost_leases_in_a_row_runs_become_suspects(deaths: Deaths) -> None:
    """A run that blocks its process for longer than a lease is found, too."""
    deaths.submitted("r1")
    found = []
    for _ in range(5):
        lost = deaths.worker("r1")
        deaths.lose(lost)
        deaths.do("register", incarnation="again", previous=lost)
        found.append(deaths.stuck())

    assert found == [0, 0, 0, 1, 2]


def test_a_record_in_between_restarts_the_count(deaths: Deaths) -> None:
    """Interruptions of Redis with progress in between never make a suspect."""
    deaths.submitted("r1")
    for number in range(8):
        lost = deaths.worker("r1", commits=["r1"] if number % 3 == 0 else [])
        deaths.lose(lost)
        deaths.do("register", incarnation="again", previous=lost)

    assert (deaths.stuck(), deaths.group("r1")) == (0, "")


def test_leases_that_end_within_a_heartbeat_make_no_suspects(deaths: Deaths) -> None:
    """Redis was unreachable: it is unlikely that two processes died at the same time."""
    deaths.submitted("r1", "r2", "r3")
    deaths.lose(deaths.worker("r1", "r2"), deaths.worker("r3"), heartbeat_ms=HEARTBEAT_MS)

    assert [deaths.group(run_id) for run_id in ("r1", "r2", "r3")] == ["", "", ""]
    assert json.loads(deaths.field("suspicion", "r1") or "")["spared"] == 1


def test_leases_that_end_separately_make_suspects(deaths: Deaths) -> None:
    """Two separate deaths."""
    deaths.submitted("r1", "r2")
    first = deaths.worker("r1")
    deaths.lose(first, heartbeat_ms=HEARTBEAT_MS)
    deaths.lab.let_pass(2 * HEARTBEAT_MS)
    deaths.lose(deaths.worker("r2"), heartbeat_ms=HEARTBEAT_MS)

    assert (deaths.stuck("r1"), deaths.stuck("r2")) == (1, 1)


def test_the_second_of_several_lost_leases_clears_the_first(deaths: Deaths) -> None:
    """When the first one was reclaimed, it still looked like a death."""
    deaths.submitted("r1", "r2")
    first, second = deaths.worker("r1"), deaths.worker("r2")
    deaths.lose(first, heartbeat_ms=HEARTBEAT_MS)
    assert deaths.stuck("r1") == 1

    deaths.lose(second, heartbeat_ms=HEARTBEAT_MS)

    assert (deaths.stuck("r1"), deaths.stuck("r2")) == (0, 0)


def test_a_worker_that_retires_with_runs_makes_no_suspects(deaths: Deaths) -> None:
    """It was asked to stop; none of its runs has killed it."""
    deaths.submitted("r1")
    deaths.do("retire", incarnation=deaths.worker("r1"))
    deaths.do("reclaim")

    assert (deaths.stuck(), deaths.field("state")) == (0, "queued")


# --- runs named by the watchdog --------------------------------------------------------------------------


def test_a_run_that_the_watchdog_named_is_the_only_suspect(deaths: Deaths) -> None:
    """The other runs are not suspects, and no worker waits for the lease of a process that reports its
    end."""
    deaths.submitted("r1", "r2", "r3")
    worker = deaths.worker("r1", "r2", "r3")

    assert deaths.do("accuse", run_id="r2", incarnation=worker)
    deaths.do("reclaim")

    assert deaths.group("r2") == f"{worker}:named"
    assert (deaths.group("r1"), deaths.group("r3")) == ("", "")
    assert deaths.score("workers", worker) is None


def test_a_run_that_was_named_twice_is_poisoned(deaths: Deaths) -> None:
    """Whatever the limit of recoveries is."""
    deaths.submitted("r1", "r2")
    for state in ("queued", "failed"):
        worker = deaths.worker("r1", "r2")
        deaths.do("accuse", incarnation=worker)
        deaths.do("reclaim")
        assert deaths.field("state") == state

    assert deaths.failed_with("r1") == "run.poisoned"
    assert deaths.field("state", "r2") == "queued"


def test_the_watchdog_overrides_records_of_the_run(deaths: Deaths) -> None:
    """It has observed that the run blocks the event loop; an earlier record does not matter."""
    deaths.submitted("r1")
    for commits in (["r1"], []):
        worker = deaths.worker("r1", commits=commits)
        deaths.do("accuse", incarnation=worker)
        deaths.do("reclaim", blameless=True)

    assert deaths.failed_with("r1") == "run.poisoned"


@pytest.mark.parametrize("whose", ["of nobody", "of another worker", "of a worker that is gone"])
def test_a_run_of_another_worker_is_not_named(deaths: Deaths, whose: str) -> None:
    """The run has another owner in the meantime."""
    deaths.submitted("r1")
    worker = deaths.worker()
    if whose != "of nobody":
        other = deaths.worker("r1")
        if whose == "of a worker that is gone":
            deaths.lose(other)

    assert not deaths.do("accuse", incarnation=worker)
    assert deaths.score("workers", worker) is not None


# --- workers of the previous version ---------------------------------------------------------------------


def test_a_run_that_the_previous_version_claimed_is_counted_its_way(deaths: Deaths) -> None:
    """It has no groups, and separates runs that died twice: so each death counts, as before."""
    deaths.submitted("r1", "r2")
    for _ in range(2):
        worker = deaths.worker("r1", "r2")
        for run_id in ("r1", "r2"):
            deaths.redis.hdel(deaths.store.keys("run", run_id), "claimed_at")
        deaths.redis.delete(deaths.store.keys("suspects", worker))
        deaths.lose(worker)

    assert (deaths.stuck("r1"), deaths.stuck("r2")) == (2, 2)
    worker = deaths.worker("r1")
    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "SUSPECT_BUSY"


def test_a_record_of_the_previous_version_removes_suspicion_too(deaths: Deaths) -> None:
    """It does not know the field, but the journal is longer than when the suspicion was written."""
    deaths.submitted("r1", "r2")
    deaths.dies("r1", "r2")
    deaths.redis.rpush(deaths.store.keys("journal", "r2"), '{"call":"0.0"}')
    worker = deaths.worker("r1")

    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "CLAIMED"


def test_a_suspect_that_the_previous_version_reclaimed_does_not_block(deaths: Deaths) -> None:
    """It leaves the run in the set of suspects of the worker."""
    deaths.submitted("r1", "r2")
    deaths.dies("r1", "r2")
    worker = deaths.worker("r1")
    deaths.redis.hset(deaths.store.keys("run", "r1"), "owner", "")

    assert deaths.do("claim", run_id="r2", incarnation=worker).answer == "CLAIMED"
    deaths.redis.hset(deaths.store.keys("run", "r1"), "owner", worker)
