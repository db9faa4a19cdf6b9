"""A chaos run of half a minute: it is clean, and its audit finds what was tampered with afterwards."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

import pytest

from chaos.run import ChaosRun, Options, chaos_run
from chaos.schedule import WEIGHTS, schedule
from openagents_worker.models import RunState

SHORT = Options(seed=11, minutes=0.6, runs_per_second=4, faults_per_minute=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Generator[ChaosRun]:
    with chaos_run(SHORT, tmp_path_factory.mktemp("chaos")) as run:
        run.inject()
        yield run


def test_a_seed_is_a_schedule() -> None:
    """It contains every kind of fault, also in the short edition."""
    faults = schedule(SHORT.seed, SHORT.minutes, per_minute=SHORT.faults_per_minute)

    assert faults == schedule(SHORT.seed, SHORT.minutes, per_minute=SHORT.faults_per_minute)
    assert faults != schedule(SHORT.seed + 1, SHORT.minutes, per_minute=SHORT.faults_per_minute)
    assert {fault.kind for fault in faults} == set(WEIGHTS)


def test_nothing_is_lost_repeated_reordered_or_left_behind(run: ChaosRun) -> None:
    found, endings = run.audit()

    assert found.clean(), run.report(found, endings)["first_violations"]
    assert run.faults.errors == []
    assert run.faults.done.total() >= 15
    assert endings["completed"] >= 50


def test_the_audit_finds_what_is_wrong(run: ChaosRun) -> None:
    """Each kind of damage is done to what a clean run has left behind."""
    deployment, accepted = run.deployment, run.load.accepted
    keys, admin = deployment.client.store.keys, deployment.admin
    completed = [
        each for each in accepted if deployment.client.record(each.run_id).state is RunState.COMPLETED
    ]
    lost, unended, gap, renamed = (each.run_id for each in completed[:4])
    repeated = completed[4].run_id
    admin.delete(keys("run", lost))
    admin.hset(keys("run", unended), "state", "cancelled")
    admin.xdel(keys("events", gap), "2-0")
    admin.persist(keys("run", renamed))
    winner = next(each for each in deployment.effects.executions if each.run_id == repeated)
    now = time.monotonic()
    again = replace(winner, serial=10**9, begun=now, arrived=now)
    deployment.effects.executions.append(again)
    session = next(each for each in completed[5:] if _has_successor(each.session_id, run))
    members = [each for each in accepted if each.session_id == session.session_id]
    at = [accepted.index(each) for each in members]
    for place, member in zip(at, reversed(members), strict=True):
        accepted[place] = member

    found, _ = run.audit()

    assert len(found.lost) == 1
    assert lost in found.lost[0]
    assert any(unended in each for each in found.unexpected_endings)
    assert any(unended in each for each in found.terminal_events)
    assert any(gap in each for each in found.event_gaps)
    assert any(winner.key in each for each in found.repeated_steps)
    assert any(keys("run", renamed) in each for each in found.keys_without_ttl)
    assert any(session.session_id in each for each in found.order)


def _has_successor(session_id: str, run: ChaosRun) -> bool:
    members = [each for each in run.load.accepted if each.session_id == session_id]
    return len(members) > 1 and not any(each.cancelled for each in members)
