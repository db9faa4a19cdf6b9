"""Deletion. The only place that defines how a session is deleted: cancel its runs, wait, delete.

`delete_session` and `prune` are plans. Their docstrings are those of the methods of clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from openagents_worker.arguments import text_of_caller
from openagents_worker.errors import SessionBusy
from openagents_worker.producer.plans import Sending
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.store import scripts
from openagents_worker.store.client import Plan
from openagents_worker.store.index_pages import for_each_id
from openagents_worker.store.keys import Keys
from openagents_worker.store.listing import prune_indexes
from openagents_worker.store.paging import read_ids
from openagents_worker.store.records import states_plan
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.scripts import DeleteAnswer, Deleted, Wake

__all__ = ["delete_session", "deletion", "prune"]

RUNS_A_CALL = 100
PATIENCE_S = 5.0  # for those that are notified of ends, and for new runs that are submitted meanwhile
PAUSE_S = 0.05


def delete_session(publishing: PublishingApp, session_id: str, *, force: bool = False) -> Plan[int]:
    """Delete a session and all data of its runs from Redis. Returns the number of runs.

    The sessions that were created for children of its runs are deleted, too. Raises `SessionBusy` if one of
    the runs has not ended. With `force` the runs are cancelled first. It may wait up to about five seconds
    until Celery was notified of the end of a run, and until a worker has cancelled the jobs and the
    responses in the background that the runs have left behind.
    """
    return deletion(publishing.keys, session_id, force=force, send=publishing.send_wakes)


def prune(_: PublishingApp) -> Plan[int]:
    """Remove expired runs and sessions from the lists. Returns the number of removed entries."""
    return prune_indexes()


def deletion(
    keys: Keys,
    session_id: str,
    *,
    force: bool,
    send: Callable[[Sequence[Wake]], object],
    clock: Callable[[], float] = time.monotonic,
) -> Plan[int]:
    """The plan that deletes a session and its runs. It returns the number of runs. Raises `SessionBusy`.

    `send` sends the wake-ups of runs of other sessions; the plan yields it as a step (`Sending`).

    Runs that have not ended are cancelled with `force`. Without `force` they raise `SessionBusy` before
    anything is deleted. The plan waits up to five seconds until Celery was notified of the end of each run,
    and until the jobs and responses that it has left behind were cancelled. After that, with `force` it
    deletes the session, without `force` it raises `SessionBusy`.
    """
    text_of_caller("session_id", session_id)
    sessions = yield from _with_sessions_of_children(keys, session_id)
    for each in sessions if not force else ():
        if live := (yield from _live_runs(keys, each)):
            raise _session_busy(each, live[-1])
    runs = 0
    for each in sessions:  # the children last: they end with their parents
        runs += yield from _deletion_of_one(keys, each, force=force, send=send, clock=clock)
    return runs


def _deletion_of_one(
    keys: Keys,
    session_id: str,
    *,
    force: bool,
    send: Callable[[Sequence[Wake]], object],
    clock: Callable[[], float],
) -> Plan[int]:
    deadline, runs = clock() + PATIENCE_S, 0
    while True:
        too_late = clock() >= deadline
        answer: Deleted = yield scripts.delete_session(
            session_id=session_id, limit=RUNS_A_CALL, even_if_not_notified=force and too_late
        )
        runs += answer.runs
        match answer.answer:
            case DeleteAnswer.DELETED:
                return runs
            case DeleteAnswer.MORE:
                pass
            case DeleteAnswer.NOT_NOTIFIED if not too_late:
                yield PAUSE_S
            case DeleteAnswer.BUSY if force and not too_late:
                for run_id in (yield from _live_runs(keys, session_id)):
                    cancelled = yield scripts.cancel(run_id=run_id, reason="session deleted", force=True)
                    if cancelled.wakes:
                        yield Sending(partial(send, cancelled.wakes))
            case _:
                raise _session_busy(session_id, answer.run_id)


def _with_sessions_of_children(keys: Keys, session_id: str) -> Plan[list[str]]:
    """The session, and those that were created for the children of its runs, and for theirs."""
    sessions = {session_id: None}
    new = [session_id]
    while new:
        parent_session = new.pop()
        runs = yield from read_ids(keys("index", f"session={parent_session}"))
        runs = yield from _runs_of(keys, parent_session, runs)
        counts = yield from for_each_id(runs, lambda r, id_: r.zcard(keys("index", f"parent={id_}")))
        for run_id, (count,) in zip(runs, counts, strict=True):
            if default_if_wrong_type(count, 0):
                new += yield from _own_sessions(keys, run_id, known=sessions)
    return list(sessions)


def _own_sessions(keys: Keys, run_id: str, *, known: dict[str, None]) -> Plan[list[str]]:
    """The sessions that were created for the children of a run. They are added to the known ones."""
    children = yield from read_ids(keys("index", f"parent={run_id}"))
    fields = yield from for_each_id(children, lambda r, id_: r.hget(keys("run", id_), "session"))
    ids = [id_ for (id_,) in fields if isinstance(id_, str) and id_ not in known]
    owners = yield from for_each_id(ids, lambda r, id_: r.hget(keys("session", id_), "of_child"))
    found = [id_ for id_, (owner,) in zip(ids, owners, strict=True) if owner == run_id]
    known.update(dict.fromkeys(found))
    return found


def _runs_of(keys: Keys, session_id: str, run_ids: Sequence[str]) -> Plan[list[str]]:
    """Those that are not runs of another session: after a run has expired, its id may be used again there."""
    rows = yield from for_each_id(run_ids, lambda r, id_: r.hget(keys("run", id_), "session"))
    sessions = [default_if_wrong_type(session, None) for (session,) in rows]
    return [id_ for id_, own in zip(run_ids, sessions, strict=True) if own in (None, session_id)]


def _live_runs(keys: Keys, session_id: str) -> Plan[list[str]]:
    """The runs that have not ended, in the order for cancelling: the end of the queue first, the holder last.

    In this order, no cancelled run lets another one start.
    """
    indexed = yield from read_ids(keys("index", f"session={session_id}"))
    waiting = yield from read_ids(keys("session_queue", session_id))
    holder = yield lambda r: r.hget(keys("session", session_id), "holder")
    queue_order = dict.fromkeys([*reversed(waiting), *([holder] if holder else [])])
    ids = [*(run_id for run_id in indexed if run_id not in queue_order), *queue_order]
    states = yield from states_plan(keys, (yield from _runs_of(keys, session_id, ids)))
    return [id_ for id_, state in states.items() if state is not None and not state.is_terminal]


def _session_busy(session_id: str, run_id: str) -> SessionBusy:
    return SessionBusy(
        f"the session {session_id!r} cannot be deleted: its run {run_id!r} has not ended, or Celery was not "
        "notified of its end yet, or a job or a response of it is not cancelled yet",
        hint="cancel the run, wait for it, or use force=True, which cancels all runs of the session",
        session_id=session_id,
        run_id=run_id,
    )
