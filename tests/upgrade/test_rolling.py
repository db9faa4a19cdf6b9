"""A rolling upgrade: workers and producers of the previous commit and of this one share one Redis, one queue.

If this fails, an upgrade from the previous commit needs more than starting new workers and stopping old ones.
What an older worker would misread takes two commits: one that reads a new format, and a later one that writes
it (`store/formats.py`).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Generator, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.events import RunEvent
from openagents_worker.models import RunState
from openagents_worker.store.formats import DELEGATES, HAS_JOB, HOLDS_TURNS, PARKS, SUMMARIES
from tests.support.deployment import story
from tests.support.waiting import wait_for
from tests.upgrade.versions import Version, previous, this
from tests.upgrade.workshop import MANY, PATIENCE_S, Workshop, opened, request

SESSIONS = [f"s{number}" for number in range(4)]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return previous(tmp_path_factory.mktemp("history"))


@pytest.fixture(scope="module")
def new() -> Version:
    return this()


@pytest.fixture
def enough() -> threading.Event:
    return threading.Event()


@pytest.fixture
def workshop(tmp_path: Path, enough: threading.Event) -> Generator[Workshop]:
    with opened(tmp_path, enough) as workshop:
        yield workshop
        enough.set()


@pytest.mark.share(of=2)
@pytest.mark.parametrize("begins", ["old", "new"])
def test_runs_cross_between_the_versions_and_nothing_is_repeated(
    old: Version, new: Version, workshop: Workshop, enough: threading.Event, begins: str
) -> None:
    """By hand-over and by the death of their worker, from one version to the other and back."""
    one, other = (old, new) if begins == "old" else (new, old)
    if not one.begins_what_is_read_by(other):
        runs_are_left_to_those_who_read_them(one, other, workshop, enough)
        return
    long = [request(session=session) for session in SESSIONS]
    following = [request(session=session, steps=2) for session in SESSIONS]
    limited = [request(steps=3, limited=True) for _ in range(4)]
    first = workshop.start(one)
    runs = workshop.produce(other, "submit", long[:2])["runs"]
    runs += workshop.produce(one, "submit", long[2:])["runs"]
    workshop.produce(one, "submit", [*following[:2], *limited[:2]])
    workshop.produce(other, "submit", [*following[2:], *limited[2:]])

    workshop.works_on(first, runs)
    second = workshop.start(other)
    first.terminate()
    workshop.works_on(second, runs)
    third = workshop.start(one)
    second.kill()
    workshop.works_on(third, runs)
    fourth = workshop.start(other)
    third.kill()
    workshop.works_on(fourth, runs)
    fifth = workshop.start(one)
    fourth.terminate()
    workshop.works_on(fifth, runs)
    workshop.start(other)
    enough.set()

    for asked in (*long, *following):
        completed_without_repeating(workshop, asked["run_id"])
    for asked in limited:  # the model asked for patience, and got the same request again
        completed_without_repeating(workshop, asked["run_id"], retries=1)
    for run_id in runs:
        events = story(workshop.client.handle(run_id))
        assert [how for _, how, _ in crossings(events)] == [
            "run.handed_over",
            "run.recovered",
            "run.recovered",
            "run.handed_over",
        ]
        by_version = [one.wrote(line["code"]) for line in workshop.sawn(run_id)]
        assert [is_one for is_one, _ in groupby(by_version)] == [True, False, True, False, True]
        assert all(old.wrote(line["code"]) or new.wrote(line["code"]) for line in workshop.sawn(run_id))
    for asked in limited:
        names = [event.name for event in story(workshop.client.handle(asked["run_id"]))]
        assert names.count("run.retry_scheduled") == 1
    for session, before, after in zip(SESSIONS, long, following, strict=True):
        transcript = workshop.client.session(session).transcript
        assert [message["run_id"] for message in transcript] == [
            *[before["run_id"]] * 2,
            *[after["run_id"]] * 2,
        ]


def runs_are_left_to_those_who_read_them(
    newer: Version, older: Version, workshop: Workshop, enough: threading.Event
) -> None:
    """What the newer version has begun in a format of its own waits for it; the older one touches nothing."""
    first = workshop.start(newer)
    runs = workshop.produce(older, "submit", [request(), request()])["runs"]
    workshop.works_on(first, runs)
    old = workshop.start(older)
    first.kill()
    for run_id in runs:
        wait_for(lambda run_id=run_id: is_left(workshop, run_id), "it is left to others", timeout=PATIENCE_S)
    old.terminate()
    workshop.start(newer)
    enough.set()

    for run_id in runs:
        completed_without_repeating(workshop, run_id)
        assert all(newer.wrote(line["code"]) for line in workshop.sawn(run_id))


def is_left(workshop: Workshop, run_id: str) -> bool:
    """Told from what is stored, as the run is still alive."""
    redis: Any = workshop.client.store.redis
    entries = redis.xrange(workshop.client.store.keys("events", run_id))
    return any(fields["name"] == "run.left_to_others" for _, fields in entries)


PARKED = {
    "asking": "waiting",
    "gluing": "waiting",
    "varnishing": "awaiting_approval",
    "painting": "paused",
}
"""The agents whose runs park, and the state of each."""


def test_parked_runs_wait_for_a_version_that_knows_their_state(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """One run in each of these states. A version that does not know them executes and reads none of it, and
    loses no time-out."""
    asked = [request(agent=agent) for agent in PARKED]
    asking, gluing, varnishing, painting = (each["run_id"] for each in asked)
    first = workshop.start(new)
    workshop.produce(old, "submit", asked)
    wait_for(lambda: len(workshop.calls(painting)) == 2, "it has sawn, and begins to paint")
    first.kill()  # nobody knows now whether it has painted
    first = workshop.start(new)
    for each in asked:
        state = PARKED[each["agent_id"]]
        wait_for(
            lambda id_=each["run_id"], state=state: workshop.client.record(id_).state == state, "it parks"
        )
    first.kill()
    second = workshop.start(old)
    seen = workshop.produce(old, "look", asked)["seen"]
    workshop.client.send(asking, "length", 120)
    (approval,) = workshop.client.handle(varnishing).approvals()
    workshop.client.approve(varnishing, approval.call_id, by="anna")
    workshop.client.resolve(painting, "paint", "skip", by="anna", result="painted")
    if not old.reads(PARKS):
        assert seen == ["run.other_format"] * len(asked)
        wait_for(lambda: is_left(workshop, asking), "it is left to others", timeout=PATIENCE_S)
        second.terminate()
        workshop.start(new)

    for run_id, output in (
        (asking, "sawn"),
        (gluing, "glued"),
        (varnishing, "varnished"),
        (painting, "painted"),
    ):
        result = workshop.client.handle(run_id).wait(timeout=PATIENCE_S)
        assert result.final_output == output, result.error_details
        assert result.usage.tool_calls == 2
        story(workshop.client.handle(run_id))


@pytest.mark.long
def test_a_run_with_a_job_waits_for_a_version_that_knows_jobs(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """A version that does not know them would call the tool in another way, and have the effect twice."""
    asked = request(agent="firing")
    run_id = asked["run_id"]
    first = workshop.start(new)
    workshop.produce(old, "submit", [asked])
    wait_for(lambda: workshop.client.record(run_id).state == "waiting", "it waits for its job")
    first.kill()
    second = workshop.start(old)
    if not old.reads(HAS_JOB):
        wait_for(lambda: is_left(workshop, run_id), "it is left to others", timeout=PATIENCE_S)
        second.terminate()
        workshop.start(new)
    workshop.end_jobs()

    result = workshop.client.handle(run_id).wait(timeout=PATIENCE_S)
    assert result.final_output == "fired", result.error_details
    assert [line["what"] for line in workshop.sawn(run_id)] == ["begin"]
    story(workshop.client.handle(run_id))


@pytest.mark.long
def test_a_parent_and_its_child_wait_for_a_version_that_knows_children(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """The older version executes neither; the newer one goes on with both."""
    asked = request(agent="foreman")
    parent = asked["run_id"]
    first = workshop.start(new)
    workshop.produce(old, "submit", [asked])
    wait_for(lambda: workshop.client.record(parent).state is RunState.WAITING_CHILD, "it has delegated")
    [child] = [run.run_id for run in workshop.client.runs(parent_run_id=parent).items]
    wait_for(lambda: workshop.client.record(child).state is RunState.WAITING, "the child parks")
    first.kill()
    second = workshop.start(old)
    workshop.client.send(child, "length", 120)
    if not old.reads(DELEGATES):
        wait_for(lambda: is_left(workshop, child), "it is left to others", timeout=PATIENCE_S)
        second.terminate()
        workshop.start(new)

    result = workshop.client.handle(parent).wait(timeout=PATIENCE_S)
    assert result.final_output == "built", result.error_details
    assert workshop.client.record(child).parent_run_id == parent
    story(workshop.client.handle(parent))


@pytest.mark.long
def test_a_parent_that_lends_its_session_waits_for_a_version_that_holds_turns(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """The older version would let the child write to the session, and would lose what the parent holds."""
    asked = request(session="house", agent="landlord")
    parent = asked["run_id"]
    first = workshop.start(new)
    workshop.produce(old, "submit", [asked])
    wait_for(lambda: workshop.client.record(parent).state is RunState.WAITING_CHILD, "it has delegated")
    [child] = [run.run_id for run in workshop.client.runs(parent_run_id=parent).items]
    wait_for(lambda: workshop.client.record(child).state is RunState.WAITING, "the child parks")
    first.kill()
    second = workshop.start(old)
    workshop.client.send(child, "length", 120)
    if not old.reads(HOLDS_TURNS):
        wait_for(lambda: is_left(workshop, child), "it is left to others", timeout=PATIENCE_S)
        assert workshop.client.session("house").transcript == ()
        second.terminate()
        workshop.start(new)

    result = workshop.client.handle(parent).wait(timeout=PATIENCE_S)
    assert result.final_output == "let", result.error_details
    transcript = workshop.client.session("house").transcript
    assert [message["run_id"] for message in transcript] == [child, child, parent, parent]
    story(workshop.client.handle(parent))


@pytest.mark.long
def test_a_session_with_a_summary_waits_for_a_version_that_knows_summaries(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """A version that does not know them would show a run other messages than those with which it began."""
    first = workshop.start(new)
    for _ in range(3):
        planted = workshop.client.submit(request(session="garden", agent="gardener"))
        assert planted.wait(timeout=PATIENCE_S).stop_reason == "completed"
    summary = workshop.client.session("garden").summary
    assert summary is not None
    first.terminate()
    second = workshop.start(old)
    sawing = request(session="garden", steps=2)
    workshop.produce(old, "submit", [sawing])
    if not old.reads(SUMMARIES):
        run_id = sawing["run_id"]
        wait_for(lambda: is_left(workshop, run_id), "it is left to others", timeout=PATIENCE_S)
        second.terminate()
        workshop.start(new)

    completed_without_repeating(workshop, sawing["run_id"])
    session = workshop.client.session("garden")
    assert (session.summary, len(session.transcript)) == (summary, 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_back_and_forth_between_the_versions(
    old: Version, new: Version, workshop: Workshop, enough: threading.Event, seed: int
) -> None:
    """Twenty runs, twelve times from one version to the other, by whichever way chance wants."""
    chance = random.Random(seed)
    asked = [request() for _ in range(20)]
    versions = (new, old) if new.begins_what_is_read_by(old) else (old, new)
    worker = workshop.start(versions[0])
    runs = (
        workshop.produce(new, "submit", asked[:10])["runs"]
        + workshop.produce(old, "submit", asked[10:])["runs"]
    )
    workshop.works_on(worker, runs)

    for version in versions[::-1] * 6:
        successor = workshop.start(version)
        chance.choice((worker.terminate, worker.kill))()
        workshop.works_on(successor, runs)
        worker = successor
    enough.set()

    for run_id in runs:
        completed_without_repeating(workshop, run_id)
        assert len(crossings(story(workshop.client.handle(run_id)))) == 12


def completed_without_repeating(workshop: Workshop, run_id: str, retries: int = 0) -> None:
    """It has its answer, and only calls that were in flight when a worker died were made once more."""
    handle = workshop.client.handle(run_id)
    result = handle.wait(timeout=PATIENCE_S)
    assert result.stop_reason == "completed", result.error_details
    calls = workshop.calls(run_id)
    once = [key for key, _ in groupby(calls)]
    assert len(once) == len(set(once)), f"{run_id}: a call was made again after its successor"
    assert len(calls) - len(once) <= handle.record().recoveries + retries, (
        f"{run_id}: made again, not in flight"
    )
    assert len(once) == result.usage.llm_calls + result.usage.tool_calls


def crossings(events: Iterable[RunEvent]) -> list[tuple[str, str, str]]:
    """From which worker, how and to which one a run has gone."""
    found, run_host, how = [], "", ""
    for event in events:
        if event.name in ("run.handed_over", "run.recovered"):
            how = event.name
        elif event.name == "run.attempt_started":
            before, run_host = run_host, str(event.worker).partition("@")[0]
            if before not in ("", run_host):
                found.append((before, how, run_host))
    return found


@pytest.mark.long
def test_an_error_that_was_recorded_is_replayed_by_the_version_before(
    old: Version, new: Version, workshop: Workshop
) -> None:
    """With what a newer worker has recorded beside it."""
    one, other = new, old
    if not one.begins_what_is_read_by(other):
        pytest.skip("runs of the newer version are left to it")
    asked = request(agent="careful")
    first = workshop.start(one)
    (run_id,) = workshop.produce(one, "submit", [asked])["runs"]
    workshop.works_on(first, [run_id])
    first.kill()
    workshop.start(other)

    handle = workshop.client.handle(run_id)
    result = handle.wait(timeout=PATIENCE_S)

    assert result.final_output == "done", result.error_details
    assert crossings(story(handle)) == [(f"{one.name}1", "run.recovered", f"{other.name}1")]


@pytest.fixture(scope="module", params=["producer", "worker"])
def mixed(
    request: pytest.FixtureRequest, old: Version, new: Version, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Workshop, Version, Version]]:
    """A workshop with one worker, the version of its producers, and that of the worker; one is upgraded."""
    producer, worker = (new, old) if request.param == "producer" else (old, new)
    enough = threading.Event()
    with opened(tmp_path_factory.mktemp("mixed"), enough) as workshop:
        workshop.start(worker)
        yield workshop, producer, worker
        enough.set()


@pytest.mark.share(of=2)
def test_a_failed_run_is_read_by_the_other_version(mixed: tuple[Workshop, Version, Version]) -> None:
    """Its error with all that a newer worker tells of it, or without what an older one does not tell."""
    workshop, producer, _ = mixed

    told = workshop.produce(producer, "fail", [request(agent="clumsy")])

    assert (told["code"], told["message"]) == ("tool.error", "ValueError: the saw slipped")
    if told["traceback"] is not None:
        assert "in slip" in told["traceback"]


@pytest.mark.share(of=2)
def test_a_producer_and_a_worker_of_different_versions_understand_each_other(
    mixed: tuple[Workshop, Version, Version],
) -> None:
    """Whichever of the two is upgraded first: submitted, watched, waited for, cancelled."""
    workshop, producer, worker = mixed
    watched, cancelled, awaited = request(steps=3), request(), request(steps=2, limited=True)

    told = workshop.produce(producer, "use", [watched, cancelled, awaited])

    assert told["seqs"] == list(range(1, len(told["seqs"]) + 1))
    assert told["final"] is True
    assert (told["output"], told["awaited"]) == ("done after 3", "done after 2")
    assert told["steps"] == 7  # four replies, three tools; checkpoint 0 is the start
    assert told["again"] is True
    assert told["cancelled"] == "run.cancelled"
    states = [workshop.client.record(asked["run_id"]).state for asked in (watched, cancelled, awaited)]
    assert states == [RunState.COMPLETED, RunState.CANCELLED, RunState.COMPLETED]
    assert all(worker.wrote(line["code"]) for line in workshop.sawn(watched["run_id"]))


@pytest.mark.long
def test_the_version_before_executes_runs_that_interrupt_and_forks(
    workshop: Workshop, old: Version, enough: threading.Event
) -> None:
    """A producer of this version may use them while workers of the version before execute its runs.

    Such a worker ends the interrupted run without a turn in the transcript, as one that was cancelled.
    """
    worker = workshop.start(old)
    first = request(session="s", steps=MANY)
    workshop.client.submit(first)
    workshop.works_on(worker, [first["run_id"]])

    second = workshop.client.submit({**request(session="s", steps=2), "on_busy": "interrupt"})
    fork = workshop.client.fork(
        first["run_id"], f"{first['run_id']}:step:2", input_text=request(steps=3)["input_text"]
    )

    assert second.wait(timeout=PATIENCE_S).final_output == "done after 2"
    assert workshop.client.record(first["run_id"]).state is RunState.CANCELLED
    assert fork.wait(timeout=PATIENCE_S).final_output == "done after 3"
    assert len([line for line in workshop.sawn(fork.id) if line["what"] == "end"]) == 2
    assert all(old.wrote(line["code"]) for line in workshop.sawn(fork.id))
    enough.set()
