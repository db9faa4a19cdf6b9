"""A chaos run of half a minute: it is clean, and its audit finds what was tampered with afterwards."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

import pytest

from chaos.effects import Execution
from chaos.people import Steered
from chaos.run import ChaosRun, Options, chaos_run
from chaos.schedule import WEIGHTS, schedule
from openagents_worker.models import RunState
from openagents_worker.store.records import read_states

SHORT = Options(seed=11, minutes=0.55, runs_per_second=3, faults_per_minute=40)


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


def test_people_and_systems_outside_take_part(run: ChaosRun) -> None:
    """Approvals are decided in each way, and values and messages are sent to runs."""
    decided = run.decided()

    assert decided["approvals: approve"] >= 3
    assert decided["approvals: approve with other arguments"] >= 1
    assert decided["approvals: deny"] >= 1
    assert decided["values sent"] >= 10
    assert decided["messages to runs"] >= 1


def test_the_audit_finds_what_is_wrong(run: ChaosRun) -> None:
    """Each kind of damage is done to what a clean run has left behind."""
    deployment, accepted = run.deployment, run.load.accepted
    keys, admin = deployment.client.store.keys, deployment.admin
    states = read_states(deployment.client.store, [each.run_id for each in accepted])
    completed = [  # a Redis that saves every second may have lost a run with its last second
        each
        for each in accepted
        if each.run_id.startswith("r")
        and not each.plan.payments
        and states[each.run_id] is RunState.COMPLETED
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


def test_the_audit_finds_what_was_not_decided(run: ChaosRun) -> None:
    """A denied payment that is made, an approved one that is made twice, and so on."""
    executions, people = run.deployment.effects.executions, run.people
    states = read_states(run.deployment.client.store, [each.run_id for each in run.load.accepted])
    completed = [each for each in run.load.accepted if states[each.run_id] is RunState.COMPLETED]
    ids = {each.run_id for each in completed}
    mine = [answer for answer in people.answers if answer.is_mine and answer.run_id in ids]
    denied = next(answer for answer in mine if answer.decision.action == "deny")
    twice, other = (
        next(each for each in executions if (each.run_id, each.n) == (answer.run_id, answer.n))
        for answer in [answer for answer in mine if answer.decision.action == "approve"][:2]
    )
    mailboxes = [each for each in completed if each.plan.agent_id == "mailbox"]
    received, asleep = mailboxes[0], next(each for each in mailboxes if each.plan.values > 1)
    steered = next(each for each in completed if len(_model_calls(each.run_id, executions)) > 2)
    now, began = time.monotonic(), _model_calls(steered.run_id, executions)[0].arrived
    executions.append(
        replace(twice, serial=10**9 + 1, run_id=denied.run_id, key=f"{denied.run_id}:u:x", n=denied.n)
    )
    executions.append(replace(twice, serial=10**9 + 2, begun=now, arrived=now))
    executions[executions.index(other)] = replace(other, cents=(other.cents or 0) + 1)
    people.answers.append(replace(denied, decision=denied.decision.model_copy(update={"by": "nobody"})))
    received.plan = replace(received.plan, values=received.plan.values + 1)
    asleep.plan = replace(asleep.plan, sleep_s=1000.0)
    people.steered.append(Steered(steered.run_id, "never sent", began))
    run.faults.data_losses.clear()

    found, _ = run.audit()

    assert any(f"{denied.run_id} {denied.n} was not approved" in each for each in found.wrong_effects)
    assert any(f"{twice.key} was paid again" in each for each in found.wrong_effects)
    assert any(f"{other.run_id} {other.n} must pay" in each for each in found.wrong_effects)
    assert any(
        f"{denied.run_id} {denied.n}: the answer was deny by nobody" in each for each in found.wrong_decisions
    )
    assert any(received.run_id in each for each in found.wrong_values)
    assert any(asleep.run_id in each for each in found.early_wakes)
    assert any(steered.run_id in each for each in found.wrong_steering)


def _model_calls(run_id: str, executions: list[Execution]) -> list[Execution]:
    return [each for each in executions if each.run_id == run_id and not each.n]


def _has_successor(session_id: str, run: ChaosRun) -> bool:
    members = [each for each in run.load.accepted if each.session_id == session_id]
    return len(members) > 1 and not any(each.cancelled for each in members)
