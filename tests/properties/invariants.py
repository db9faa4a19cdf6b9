"""The invariants after every step: the only place that compares a whole cell with the model."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any
from urllib.parse import unquote

from openagents_worker.store.keys import ANY_TYPE, Keys, KeySpec, spec_of
from openagents_worker.store.ttl import ALWAYS_EXPIRING, PERMANENT
from tests.properties.lab import Entry, View
from tests.properties.payments import waits_for_approval
from tests.properties.truth import PARKED, TERMINAL, Run, Suspicion, Truth
from tests.support.stored_events import shown as shown_events

__all__ = ["check"]

TERMINAL_EVENTS = {f"run.{state}" for state in TERMINAL}
_spec_of = cache(spec_of)


def check(view: View, keys: Keys, truth: Truth) -> None:
    """Raises AssertionError with a sentence that names the broken promise and the reason."""
    cell = _Cell(view, keys)
    assert cell.ids("run") == set(truth.runs), "the runs that are known are not those that were accepted"
    assert set(cell.get("workers")) == set(truth.leases), "the workers that are known are not those that live"
    for run in truth.runs.values():
        _check_record(cell, run)
        _check_journal(cell, run, truth)
        _check_events(cell, run)
        _check_place(cell, run)
        _check_lists(cell, run)
    for session in {run.session for run in truth.runs.values()}:
        _check_session(cell, session, truth)
    for parent in {*cell.ids("children"), *truth.kids}:
        children, true = set(cell.get("children", parent)), truth.kids.get(parent, set())
        assert children == true, f"{parent} has the children {children}, but must have {true}"
    for incarnation in cell.ids("worker_runs"):
        owned = truth.owned(incarnation)
        assert cell.get("worker_runs", incarnation) == owned, f"{incarnation} owns something else"
    for incarnation in cell.ids("worker_box"):
        requests = truth.cancel_requested(incarnation) | truth.announcements(incarnation)
        assert cell.get("worker_box", incarnation) == requests, f"{incarnation} has other notices"
    assert set(cell.get("alone")) == set(truth.alone), "other suspects than these are to be executed alone"
    _check_connections(cell, truth)
    _check_life_times(cell, truth)


class _Cell:
    """A view of a cell, with access by the names of the table of keys."""

    def __init__(self, view: View, keys: Keys) -> None:
        self.keys = keys
        specs = {key: _spec_of(key, keys.prefix) for key in view}
        # A key of a wrong type cannot have data of the library.
        self.specs = {key: known for key, known in specs.items() if not _is_foreign(known, view[key])}
        self.view = {key: entry for key, entry in view.items() if key in self.specs}

    def get(self, name: str, *ids: str) -> Any:
        entry = self.view.get(self.keys(name, *ids))
        return entry.value if entry else {}

    def ids(self, name: str) -> set[str]:
        return {unquote(known[1]) for known in self.specs.values() if known and known[0].name == name}


def _is_foreign(known: tuple[KeySpec, str] | None, entry: Entry) -> bool:
    return known is not None and known[0].type not in (entry.kind, ANY_TYPE)


def _check_record(cell: _Cell, run: Run) -> None:
    record = cell.get("run", run.id)
    told = {
        name: record.get(name) or ""
        for name in ("state", "owner", "cancel", "interrupted", "attempt", "retries", "stuck", "format")
    }
    true = {
        "state": run.state,
        "owner": run.owner,
        "cancel": "1" if run.cancel else "",
        "interrupted": run.interrupted,
        "attempt": str(run.attempts),
        "retries": str(run.retries),
        "stuck": str(run.stuck),
        "format": str(run.format),
    }
    assert told == true, f"{run.id} is {told}, but must be {true}"
    _check_suspicion(record, run)
    _check_facts(cell, run)
    held = list(cell.get("held", run.id))
    assert held == run.turns, f"{run.id} holds the turns {held}, but must hold {run.turns}"
    written = int(record.get("held_from") or 0)
    assert written == run.turns_written, (
        f"{written} items that {run.id} holds are written, not {run.turns_written}"
    )
    if run.fence:
        assert record["fence"] == run.fence, f"the fence of {run.id} changed while it was being carried"


def _check_facts(cell: _Cell, run: Run) -> None:
    facts = {
        name: "" if name.startswith("child:") else text
        for name, text in cell.get("facts", run.id).items()
        if not name.startswith("tries:")
    }
    true = {name: "" if name.startswith("child:") else text for name, text in run.facts.items()}
    assert facts == true, f"{run.id} has the facts {facts}, but must have {true}"
    record = cell.get("run", run.id)
    is_listed = run.id in cell.get("index", "approvals")
    assert is_listed is waits_for_approval(run), f"{run.id} is in the list of approvals: {is_listed}"
    if run.state in PARKED:
        waits = [wait["fact"] for wait in json.loads(record["waits"]) if wait.get("fact")]
        assert waits == [wait.fact for wait in run.waits], f"{run.id} waits for {waits}, not {run.waits}"


def _check_suspicion(record: dict[str, str], run: Run) -> None:
    if run.over:
        return  # it is not needed any more
    held = json.loads(record.get("suspicion") or "{}")
    length = len(run.journal)
    told = Suspicion(**{name: held[name] for name in held if name != "at"}) if held else Suspicion()
    if held and held["at"] != f"{run.life}:{length}":
        told = Suspicion()
    assert told == run.suspicion, f"{run.id} is held for {told}, but must be for {run.suspicion}"


def _check_journal(cell: _Cell, run: Run, truth: Truth) -> None:
    assert list(cell.get("journal", run.id)) == run.journal, (
        f"the journal of {run.id} is not what its owners committed, in that order, once"
    )
    usage = json.loads(cell.get("run", run.id).get("usage") or '{"llm_calls":0}')["llm_calls"]
    assert usage == run.usage, f"{run.id} used {run.usage}, and {usage} is stored"
    # A worker that finishes after Redis lost a second counts calls that the journal has lost.
    is_new_fork = run.copied == len(run.journal) and usage == 0  # its first write counts the copied records
    counted = usage == sum(json.loads(text)["usage"] for text in run.journal)
    assert counted or is_new_fork or truth.lost_a_second, (
        f"the usage of {run.id} is not the sum of its records"
    )


def _check_events(cell: _Cell, run: Run) -> None:
    entries = list(cell.get("events", run.id))
    events = shown_events(entries, run.id)
    numbers = [event["seq"] for event in events]
    assert numbers == list(range(1, len(events) + 1)), f"the events of {run.id} have gaps: {numbers}"
    assert [id_ for id_, _ in entries] == [f"{number}-0" for number in numbers], f"stream ids of {run.id}"
    names = [event["name"] for event in events]
    lives = [event["life"] for event in events]
    assert lives == sorted(lives), f"lives of {run.id}"
    assert set(lives) == set(range(1, run.life + 1)), f"lives of {run.id}"
    assert names.count("run.attempt_started") == run.attempts, f"{run.id} started in secret"
    left = [event["payload"] for event in events if event["name"] == "run.left_to_others"]
    left = [told for told in left if "format" in told]
    assert {(told["format"], told["newest_read"]) for told in left} == run.left, (
        f"{run.id} was left in secret"
    )
    assert len(left) == len(run.left), f"{run.id} was left, and that is told again and again"
    told = [event["payload"]["number"] for event in events if event["name"] == "told"]
    assert told == run.told, f"{run.id} told {run.told}, and {told} is stored"
    waited = names.count("run.waiting"), names.count("run.woken")
    assert waited == (run.parks, run.wakes), f"{run.id} parked and woke in secret: {waited}"
    delegated = names.count("run.child_started"), names.count("run.child_completed")
    assert delegated == (run.kids_begun, run.kids_ended), f"{run.id} delegated in secret: {delegated}"
    for life in range(1, run.life + 1):
        shown = [event for event in events if event["life"] == life]
        terminal = [event["name"] for event in shown if event["name"] in TERMINAL_EVENTS]
        final = [event["name"] for event in shown if event.get("final")]
        if life == run.life and not run.over:
            assert terminal == final == [], f"{run.id} has not ended: {names}"
            continue
        assert len(terminal) == 1, f"{run.id} did not end once in its life {life}: {names}"
        assert final == ["session.run.completed"], f"{run.id} has no final event: {names}"
        assert [event["name"] for event in shown[-2:]] == terminal + final, f"{run.id} went on: {names}"
        assert life < run.life or terminal == [f"run.{run.state}"], f"{run.id} is {run.state}: {names}"


def _check_place(cell: _Cell, run: Run) -> None:
    """Liveness: a run that is not over is in exactly one place from which a script continues it."""
    session_queue = cell.get("session_queue", run.session)
    places = {
        "queued": run.id in cell.get("sent", "q"),
        "due": run.id in cell.get("due"),
        "timeouts": run.id in cell.get("timeouts"),
        "running": bool(run.owner) and run.id in cell.get("worker_runs", run.owner),
        "waiting_session": run.id in session_queue,
    }
    where = {name for name, there in places.items() if there}
    wanted = {"scheduled": {"due"}, "retrying": {"due"}}.get(run.state, set() if run.over else {run.state})
    if run.state == "queued" and run.since == math.inf:
        wanted = set()  # it is woken when it has its session again
    if run.state in PARKED:
        assert run.waits or run.until, f"{run.id} is parked and waits for nothing"
        wanted = {"timeouts"} if run.until else set()
    if run.may_expire or (run.force_at and not run.over):
        wanted = wanted | {"due"}
    if run.untold:
        wanted = wanted | {"queued"}  # until Celery was notified
    assert where == wanted, f"{run.id} is {run.state} and stands in {where or 'no list at all'}"
    for incarnation in cell.ids("worker_runs") - {run.owner}:
        assert run.id not in cell.get("worker_runs", incarnation), f"{run.id} is not {incarnation}'s"


def _check_lists(cell: _Cell, run: Run) -> None:
    """Every run is in its indexes; a deleted run may be in an index until that is pruned."""
    lists = ("all", "agent=a", f"session={run.session}", "tenant=x")
    missing = [name for name in lists if run.id not in cell.get("index", name)]
    assert not missing, f"{run.id} is not listed in {missing}"
    unknown = [name for name in lists if name not in cell.get("indexes")]
    assert not unknown, f"nobody will prune {unknown}"


def _check_session(cell: _Cell, session: str, truth: Truth) -> None:
    places = truth.places.get(session, [])
    queue: dict[str, float] = cell.get("session_queue", session)
    order = [
        *filter(None, [cell.get("session", session).get("holder")]),
        *sorted(queue, key=queue.__getitem__),
    ]
    assert order == places, f"session {session} has the order {order}, but places were given as {places}"
    fields = cell.get("session", session).items()
    below = {name.partition(":")[2]: text for name, text in fields if name.startswith("below:")}
    true = {child: parent for child, parent in truth.below.items() if truth.runs[child].session == session}
    assert below == true, f"session {session} was lent: {below}, but must be {true}"
    needs = int(cell.get("session", session).get("format") or 0)
    assert needs == truth.formats.get(session, 0), f"session {session} says that it has the format {needs}"
    record = cell.get("session", session)
    summaries = [int(record[f"compacted:{n + 1}"]) for n in range(int(record.get("epoch") or 0))]
    assert summaries == truth.summaries.get(session, []), f"the summaries of {session} stand for {summaries}"
    transcript = list(cell.get("transcript", session))
    assert transcript == truth.transcript.get(session, []), f"the transcript of {session} is {transcript}"


def _check_connections(cell: _Cell, truth: Truth) -> None:
    watched = {incarnation: text.split()[0] for incarnation, text in cell.get("watched").items()}
    true = {incarnation: server for incarnation, (server, _) in truth.watched.items()}
    assert watched == true, f"whose connections are seen: {watched}, but they are {true}"
    silent = set(cell.get("silent"))
    assert silent == set(truth.silent), f"silent are {silent}, but that must be {set(truth.silent)}"
    gone = cell.ids("gone")
    assert gone == set(truth.gone), f"ended early were {gone}, but that must be {set(truth.gone)}"


def _check_life_times(cell: _Cell, truth: Truth) -> None:
    """Keys of live owners never expire; all other keys do."""
    for key, known in cell.specs.items():
        assert known, f"{key} is in no table"
        spec, id_ = known[0].name, unquote(known[1])
        assert known[0].type in (cell.view[key].kind, ANY_TYPE), f"{key} is a {cell.view[key].kind}"
        if spec in PERMANENT:
            needed = True
        elif spec in ALWAYS_EXPIRING:
            needed = False
        elif spec.startswith("worker_"):
            needed = id_ in truth.leases
        elif spec == "children":
            if id_ not in truth.runs:
                continue  # its members delete it
            needed = not truth.runs[id_].over
        elif spec in ("run", "facts", "decisions", "events", "journal", "held"):
            needed = id_ in truth.runs and not truth.runs[id_].over
        else:
            needed = bool(truth.places.get(id_))
        ttl_ms = cell.view[key].ttl_ms
        assert (ttl_ms == -1) == needed, (
            f"{key} has the TTL {ttl_ms}, and is {'' if needed else 'not '}needed"
        )
